//! What the tree of a jail has: the files and folders that the VM names, at the places that they have on the host, and the
//! symbolic links on the way to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use crate::config::LandlockAccess;
use crate::sandbox::landlock::Rules;

/// As many links as the kernel follows in a path. linux/namei.h, `MAXSYMLINKS`
const MOST_LINKS: u32 = 40;

/// What of `/proc` there is, beside the process's own folder: what is asked for while a guest runs or when it is described.
const PROC: &[&str] = &[
    "/proc/cpuinfo",
    "/proc/interrupts",
    "/proc/irq",
    "/proc/meminfo",
    "/proc/sys/kernel/io_uring_disabled",
];

/// A file or a folder of the host's that is in the tree, by a path without links.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Bound {
    pub(super) path: PathBuf,
    /// Nothing of it can be written, whatever the rights of who tries. Device nodes can: what they lead to is no file.
    pub(super) readonly: bool,
    /// Device nodes in it can be opened.
    pub(super) devices: bool,
    pub(super) is_folder: bool,
    /// It lies in another one, which has the place for it.
    pub(super) is_inside: bool,
}

/// The tree, as it is made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Plan {
    /// Folders above others first.
    pub(super) bound: Vec<Bound>,
    /// Symbolic links, and what they say.
    pub(super) links: BTreeMap<PathBuf, PathBuf>,
    /// Folders that are made, those above others first: on the way to all of that, and the working directory.
    pub(super) folders: BTreeSet<PathBuf>,
}

impl Plan {
    /// The tree for a process with `rules`, which works in the folder `work`. What is not there is left out: whoever wants it
    /// says so in its own words.
    pub(super) fn of(rules: &Rules, work: &Path) -> Self {
        let mut found: BTreeMap<PathBuf, bool> = BTreeMap::new();
        let mut plan = Self::default();
        let mut take = |path: &Path, writes: bool| {
            let Ok((real, links)) = resolve(&work.join(path)) else {
                return;
            };
            plan.links.extend(links);
            *found.entry(real).or_default() |= writes;
        };
        for rule in rules.iter() {
            match rule.path.strip_prefix("/proc") {
                // The process's own, and a few files, instead of all.
                Ok(rest) if rest.as_os_str().is_empty() => {
                    PROC.iter().for_each(|path| take(path.as_ref(), false));
                }
                // They are open, and lead to what they are of.
                Ok(rest) if rest.starts_with("self") => {}
                _ => take(&rule.path, rule.access != LandlockAccess::Read),
            }
        }
        for rule in rules.images() {
            take(&rule.path, rule.access != LandlockAccess::Read);
        }
        for folder in rules.connects() {
            take(folder, false);
        }
        plan.bind(found);
        plan.make_ways(work);
        plan
    }

    /// What lies in a folder that is there, and can be written no more than that, is there with it. It is no mount of its own
    /// then, so that it can be renamed and removed.
    fn bind(&mut self, found: BTreeMap<PathBuf, bool>) {
        // Folders come before what is in them.
        for (path, writes) in found {
            let above = self.above(&path);
            if above.is_some_and(|above| !above.readonly || !writes) {
                continue;
            }
            let is_inside = above.is_some();
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            let is_folder = metadata.is_dir();
            let is_node = !is_folder && !metadata.is_file();
            self.bound.push(Bound {
                devices: is_node || path.starts_with("/dev"),
                readonly: !writes && !is_node,
                path,
                is_folder,
                is_inside,
            });
        }
    }

    fn above(&self, path: &Path) -> Option<&Bound> {
        let above = self.bound.iter().rev();
        let mut above = above.filter(|bound| path.starts_with(&bound.path));
        above.next()
    }

    fn make_ways(&mut self, work: &Path) {
        let bound = self.bound.iter().map(|bound| bound.path.clone());
        let all: Vec<_> = bound.chain(self.links.keys().cloned()).collect();
        for path in all {
            self.folders
                .extend(path.ancestors().skip(1).map(Path::to_owned));
        }
        if let Ok((work, links)) = resolve(work) {
            self.links.extend(links);
            self.folders.extend(work.ancestors().map(Path::to_owned));
        }
        // What is in a folder of the host's is there with it.
        let made = |path: &PathBuf| !self.bound.iter().any(|bound| path.starts_with(&bound.path));
        self.folders = self
            .folders
            .iter()
            .filter(|path| made(path))
            .cloned()
            .collect();
        let links = self.links.iter().filter(|(path, _)| made(path));
        self.links = links.map(|(at, to)| (at.clone(), to.clone())).collect();
    }
}

/// A link, and what it says.
type Link = (PathBuf, PathBuf);

/// Where an absolute path leads, and the links on the way.
///
/// # Errors
/// Something of it is not there, or is not to be looked at.
fn resolve(path: &Path) -> io::Result<(PathBuf, Vec<Link>)> {
    let mut real = PathBuf::from("/");
    let mut links = Vec::new();
    let mut rest: Vec<PathBuf> = components(path);
    let mut followed = 0;
    while let Some(next) = rest.pop() {
        if next == Path::new("..") {
            real.pop();
            continue;
        }
        let at = real.join(&next);
        if !fs::symlink_metadata(&at)?.is_symlink() {
            real = at;
            continue;
        }
        followed += 1;
        if followed > MOST_LINKS {
            return Err(rustix::io::Errno::LOOP.into());
        }
        let to = fs::read_link(&at)?;
        if to.is_absolute() {
            real = PathBuf::from("/");
        }
        rest.extend(components(&to));
        links.push((at, to));
    }
    Ok((real, links))
}

/// A path's parts, the last one first.
fn components(path: &Path) -> Vec<PathBuf> {
    let parts = path.components().rev();
    let parts = parts.filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    parts.map(|part| PathBuf::from(part.as_os_str())).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::config::{ConsoleConfig, DiskConfig, LandlockRule, VmConfig};

    fn bound<'a>(plan: &'a Plan, path: &Path) -> Option<&'a Bound> {
        plan.bound.iter().find(|bound| bound.path == path)
    }

    #[test]
    fn a_tree_has_what_the_vm_names_where_it_is_and_the_links_that_lead_there() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path().canonicalize().unwrap();
        for folder in ["images", "out", "names", "work"] {
            fs::create_dir(root.join(folder)).unwrap();
        }
        for file in ["images/a", "images/other", "out/serial", "kernel", "work/b"] {
            fs::write(root.join(file), "").unwrap();
        }
        symlink("../images", root.join("names/first")).unwrap();
        symlink(root.join("names/first/a"), root.join("disk")).unwrap();
        symlink("loop", root.join("loop")).unwrap();
        let config = VmConfig {
            kernel: Some(root.join("kernel")),
            disk: vec![
                DiskConfig::new(root.join("disk")),
                DiskConfig::new("b"),
                DiskConfig::new(root.join("loop")),
                DiskConfig::new(root.join("missing")),
            ],
            serial: ConsoleConfig::file(root.join("out/serial")),
            landlock_rules: vec![LandlockRule {
                path: root.join("work"),
                access: LandlockAccess::Read,
            }],
            ..VmConfig::default()
        };
        let plan = Plan::of(&Rules::of(&config, false), &root.join("work"));
        let disk = bound(&plan, &root.join("images/a")).unwrap();
        assert!(!disk.readonly && !disk.devices && !disk.is_folder && !disk.is_inside);
        // What is written in a folder that is only read is a mount in that one.
        assert!(bound(&plan, &root.join("work")).unwrap().readonly);
        let inside = bound(&plan, &root.join("work/b")).unwrap();
        assert!(inside.is_inside && !inside.readonly);
        assert!(bound(&plan, &root.join("kernel")).unwrap().readonly);
        // A file that is renamed when it is full is no mount of its own.
        assert!(bound(&plan, &root.join("out")).unwrap().is_folder);
        assert_eq!(bound(&plan, &root.join("out/serial")), None);
        for path in ["images", "images/other", "loop", "missing", "names", "disk"] {
            assert_eq!(bound(&plan, &root.join(path)), None, "{path}");
        }
        let links: Vec<_> = plan
            .links
            .iter()
            .filter(|(at, _)| at.starts_with(&root))
            .collect();
        let (first, second) = (root.join("disk"), root.join("names/first"));
        let (to_first, to_second) = (root.join("names/first/a"), PathBuf::from("../images"));
        assert_eq!(links, [(&first, &to_first), (&second, &to_second)]);
        for folder in ["images", "names"] {
            assert!(plan.folders.contains(&root.join(folder)), "{folder}");
        }
        for folder in ["out", "work"] {
            assert!(!plan.folders.contains(&root.join(folder)), "{folder}");
        }
    }

    #[test]
    fn of_dev_and_proc_there_is_what_is_named_and_no_more() {
        let plan = Plan::of(&Rules::of(&VmConfig::default(), false), Path::new("/"));
        let null = bound(&plan, Path::new("/dev/null")).unwrap();
        assert!(null.devices && !null.readonly);
        for path in [
            "/",
            "/dev",
            "/proc",
            "/sys",
            "/etc",
            "/dev/vfio",
            "/dev/mem",
        ] {
            assert_eq!(bound(&plan, Path::new(path)), None, "{path}");
        }
        let of_proc = plan
            .bound
            .iter()
            .filter(|bound| bound.path.starts_with("/proc"));
        for bound in of_proc {
            assert!(bound.readonly && !bound.devices, "{bound:?}");
            assert!(
                PROC.iter().any(|path| bound.path == Path::new(path)),
                "{bound:?}"
            );
        }
        // Device nodes can be written to by a mount that is not, and its files cannot.
        assert!(bound(&plan, Path::new("/sys/devices")).unwrap().readonly);
    }
}
