//! Which kernel modules there are, and which of them would take a device.
//!
//! What depmod (8) wrote is read as text: `modules.alias` and `modules.dep` for what can be loaded,
//! `modules.builtin` and `modules.builtin.modinfo` for what is part of the kernel.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::PathBuf;

use super::root::{self, SysRoot};

/// What the running kernel's modules take: patterns of a device's `modalias`, and the module of each.
#[derive(Clone, Debug, Default)]
pub struct Aliases {
    /// Those for one vendor, and those for any.
    by_vendor: HashMap<Option<u16>, Vec<Alias>>,
}

#[derive(Clone, Debug)]
struct Alias {
    /// The part after `pci:` or `vfio_pci:`.
    pattern: String,
    module: String,
    /// Whether a device is given to the module only on request, through `driver_override`.
    only_override: bool,
}

impl Aliases {
    /// Reads the running kernel's.
    #[must_use]
    pub fn read(root: &SysRoot) -> Self {
        let mut aliases = Self::default();
        let Some(folder) = folder(root) else {
            return aliases;
        };
        let text = fs::read(folder.join("modules.alias")).unwrap_or_default();
        for line in String::from_utf8_lossy(&text).lines() {
            let words = line.strip_prefix("alias ").and_then(|l| l.split_once(' '));
            if let Some((pattern, module)) = words {
                aliases.add(pattern, module);
            }
        }
        // `MODULE.alias=PATTERN`, each ended by a null byte.
        let text = fs::read(folder.join("modules.builtin.modinfo")).unwrap_or_default();
        for entry in String::from_utf8_lossy(&text).split('\0') {
            let words = entry.split_once('=');
            if let Some((module, pattern)) =
                words.and_then(|(key, value)| Some((key.strip_suffix(".alias")?, value)))
            {
                aliases.add(pattern, module);
            }
        }
        aliases
    }

    fn add(&mut self, pattern: &str, module: &str) {
        let (pattern, only_override) = match pattern.strip_prefix("vfio_pci:") {
            Some(pattern) => (pattern, true),
            None => match pattern.strip_prefix("pci:") {
                Some(pattern) => (pattern, false),
                None => return,
            },
        };
        let vendor = pattern
            .get(1..9)
            .and_then(|id| u32::from_str_radix(id, 16).ok())
            .and_then(|id| u16::try_from(id).ok());
        self.by_vendor.entry(vendor).or_default().push(Alias {
            pattern: pattern.to_owned(),
            module: root::one_line(module),
            only_override,
        });
    }

    /// The modules whose drivers match a device by themselves, in the order of the kernel's files.
    #[must_use]
    pub fn native(&self, modalias: &str) -> Vec<&str> {
        self.matches(modalias, false).map(|(_, m)| m).collect()
    }

    /// The modules that lend a device to user space, the most particular first: `mlx5_vfio_pci`
    /// before `vfio_pci`. Empty where the kernel has no VFIO or is older than Linux 5.16.
    #[must_use]
    pub fn vfio(&self, modalias: &str) -> Vec<&str> {
        let mut found: Vec<_> = self.matches(modalias, true).collect();
        // As libvirt and the kernel's documentation have it: the fewest wildcards win.
        found.sort_by_key(|(pattern, _)| pattern.bytes().filter(|b| *b == b'*').count());
        found.into_iter().map(|(_, module)| module).collect()
    }

    fn matches(&self, modalias: &str, only_override: bool) -> impl Iterator<Item = (&str, &str)> {
        let text = modalias.strip_prefix("pci:").unwrap_or_default().to_owned();
        let vendor = text
            .get(1..9)
            .and_then(|id| u32::from_str_radix(id, 16).ok())
            .and_then(|id| u16::try_from(id).ok());
        let some = |key| self.by_vendor.get(key).into_iter().flatten();
        let mut seen = BTreeSet::new();
        let specific = vendor.is_some().then(|| some(&vendor));
        let all = specific.into_iter().flatten().chain(some(&None));
        all.filter(move |alias| alias.only_override == only_override)
            .filter(move |alias| matches(alias.pattern.as_bytes(), text.as_bytes()))
            .map(|alias| (alias.pattern.as_str(), alias.module.as_str()))
            .filter(move |(_, module)| seen.insert(module.to_owned()))
    }
}

/// What the kernel can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Availability {
    /// It is loaded, or part of the kernel.
    There,
    /// It can be loaded.
    Loadable,
    /// This kernel does not have it.
    Missing,
    /// Nothing says: the folder of modules is not here (a container, an initramfs).
    Unknown,
}

/// Whether a module is loaded, can be, or is not to be had.
#[must_use]
pub fn availability(root: &SysRoot, module: &str) -> Availability {
    let plain = module.replace('-', "_");
    if root.sys.join("module").join(&plain).exists() {
        return Availability::There;
    }
    let Some(folder) = folder(root) else {
        return Availability::Unknown;
    };
    let lists = |name: &str| {
        let text = fs::read(folder.join(name)).ok()?;
        let text = String::from_utf8_lossy(&text);
        Some(text.lines().any(|line| {
            let path = line.split(':').next().unwrap_or_default();
            let file = path.rsplit('/').next().unwrap_or_default();
            let stem = file.split(".ko").next().unwrap_or_default();
            stem.replace('-', "_") == plain
        }))
    };
    match (lists("modules.builtin"), lists("modules.dep")) {
        (Some(true), _) => Availability::There,
        (_, Some(true)) => Availability::Loadable,
        (None, None) => Availability::Unknown,
        _ => Availability::Missing,
    }
}

/// A parameter of a module: as the loaded one has it, else as it would be loaded with, by the kernel's
/// command line and the files of modprobe.d (5). None where nothing says.
pub(crate) fn module_parameter(root: &SysRoot, module: &str, name: &str) -> Option<String> {
    let loaded = root.sys.join("module").join(module);
    if loaded.exists() {
        return root::text(&loaded.join("parameters").join(name));
    }
    let same = |word: &str| word.replace('-', "_") == module;
    let value = |word: &str| {
        let (key, value) = word.split_once('=')?;
        (key == name).then(|| root::one_line(value))
    };
    let parameters = root::text(&root.proc.join("cmdline")).unwrap_or_default();
    let of_kernel = |word: &str| {
        let (of, rest) = word.split_once('.')?;
        same(of).then(|| value(rest)).flatten()
    };
    if let Some(found) = parameters.split_whitespace().find_map(of_kernel) {
        return Some(found);
    }
    let folder = root.etc.join("modprobe.d");
    let files = root::names(&folder);
    let files = files.iter().filter(|file| file.ends_with(".conf"));
    let texts = files.filter_map(|file| root::text(&folder.join(file)));
    let of_file = |text: String| {
        text.lines().find_map(|line| {
            let mut words = line.split_whitespace();
            let is_it = words.next() == Some("options") && words.next().is_some_and(same);
            is_it.then(|| words.find_map(value)).flatten()
        })
    };
    texts.into_iter().find_map(of_file)
}

/// The folder of the running kernel's modules.
fn folder(root: &SysRoot) -> Option<PathBuf> {
    let release = root::text(&root.proc.join("sys/kernel/osrelease"))?;
    let is_name = !release.is_empty() && !release.contains('/') && release != "..";
    let folder = root.modules.join(release);
    (is_name && folder.is_dir()).then_some(folder)
}

/// Whether a pattern of `*`, `?`, sets like `[0-9]` and plain characters matches all of a text.
fn matches(pattern: &[u8], text: &[u8]) -> bool {
    let (mut p, mut t) = (0, 0);
    // Where to go on when what came after the last `*` does not match.
    let mut star: Option<(usize, usize)> = None;
    while t < text.len() {
        let step = match pattern.get(p) {
            Some(b'*') => {
                star = Some((p + 1, t));
                p += 1;
                continue;
            }
            Some(b'?') => Some(p + 1),
            Some(b'[') => set(pattern, p, text.get(t).copied()),
            Some(byte) if text.get(t) == Some(byte) => Some(p + 1),
            _ => None,
        };
        match (step, star) {
            (Some(next), _) => (p, t) = (next, t + 1),
            (None, Some((after, from))) => {
                star = Some((after, from + 1));
                (p, t) = (after, from + 1);
            }
            (None, None) => return false,
        }
    }
    pattern
        .get(p..)
        .is_some_and(|rest| rest.iter().all(|b| *b == b'*'))
}

/// The place after the set that begins at `at`, where it has `byte`.
fn set(pattern: &[u8], at: usize, byte: Option<u8>) -> Option<usize> {
    let byte = byte?;
    let body = pattern.get(at + 1..)?;
    let end = body.iter().position(|b| *b == b']')?;
    let mut body = body.get(..end)?;
    let mut has = false;
    while let Some((&first, rest)) = body.split_first() {
        match rest {
            [b'-', last, rest @ ..] => {
                has |= (first..=*last).contains(&byte);
                body = rest;
            }
            _ => {
                has |= first == byte;
                body = rest;
            }
        }
    }
    has.then_some(at + end + 2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn glob(pattern: &str, text: &str) -> bool {
        matches(pattern.as_bytes(), text.as_bytes())
    }

    #[test]
    fn patterns_match_as_the_shells_do() {
        assert!(glob("v00008086d*sv*", "v00008086d000010D3sv00001"));
        assert!(!glob("v00008086d*sv*", "v00008086d000010D3"));
        assert!(glob("*bc01sc08i02*", "v1bc01sc08i02"));
        assert!(glob("a[0-3]?c", "a2bc") && !glob("a[0-3]?c", "a4bc"));
        assert!(glob("", "") && glob("**", "") && !glob("", "x") && !glob("[", "x"));
    }

    proptest! {
        #[test]
        fn no_pattern_makes_it_fail(pattern in "[*?\\[\\]a-c-]{0,12}", text in "[a-c]{0,12}") {
            let _ = glob(&pattern, &text);
            let (around, longer) = (format!("*{text}*"), format!("x{text}y"));
            prop_assert!(glob(&around, &longer));
        }
    }

    #[test]
    fn the_most_particular_vfio_driver_comes_first() {
        let mut aliases = Aliases::default();
        aliases.add("vfio_pci:v*d*sv*sd*bc*sc*i*", "vfio_pci");
        aliases.add("vfio_pci:v000015B3d0000101Esv*sd*bc*sc*i*", "mlx5_vfio_pci");
        aliases.add("pci:v000015B3d0000101Esv*sd*bc*sc*i*", "mlx5_core");
        let modalias = "pci:v000015B3d0000101Esv000015B3sd00000001bc02sc00i00";
        assert_eq!(aliases.vfio(modalias), ["mlx5_vfio_pci", "vfio_pci"]);
        assert_eq!(aliases.native(modalias), ["mlx5_core"]);
        assert!(aliases.native("nonsense").is_empty());
    }
}
