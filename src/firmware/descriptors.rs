//! Which firmware is installed: what packages say of theirs in JSON. QEMU docs/interop/firmware.json.

use std::fs;
use std::path::{Component, Path, PathBuf};

use serde::Deserialize;

use super::error::FirmwareError;

/// Folders of descriptors, the first before the others: an administrator's before the packages'. A file of
/// the same name in an earlier one takes the place of a later one's.
const FOLDERS: [&str; 2] = ["etc/qemu/firmware", "usr/share/qemu/firmware"];
/// The most bytes of a descriptor.
const LARGEST: u64 = 64 << 10;

/// The folder below which a host's files are: `/`, or another for a host that is made up.
#[derive(Clone, Debug)]
pub struct FirmwareRoots {
    root: PathBuf,
}

impl Default for FirmwareRoots {
    fn default() -> Self {
        Self::under(Path::new("/"))
    }
}

impl FirmwareRoots {
    /// Firmware of the host whose files are below `root`.
    #[must_use]
    pub fn under(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
        }
    }

    /// What packages say, in the order in which it is to be considered.
    pub(super) fn descriptors(&self) -> Descriptors<'_> {
        let mut files: Vec<PathBuf> = Vec::new();
        for folder in FOLDERS {
            let found = fs::read_dir(self.root.join(folder)).into_iter().flatten();
            let found = found.flatten().map(|entry| entry.path());
            let found = found.filter(|path| path.extension().is_some_and(|end| end == "json"));
            for path in found {
                if !files
                    .iter()
                    .any(|file| file.file_name() == path.file_name())
                {
                    files.push(path);
                }
            }
        }
        files.sort_by(|one, other| one.file_name().cmp(&other.file_name()));
        let known = files.iter().filter_map(|path| read(path)).collect();
        Descriptors { roots: self, known }
    }

    /// A file that a descriptor names.
    fn file(&self, name: &Path) -> PathBuf {
        let parts = name.components();
        let below: PathBuf = parts
            .filter(|part| matches!(part, Component::Normal(_)))
            .collect();
        self.root.join(below)
    }
}

/// Reads a descriptor. One that cannot be read, such as an empty one by which an administrator hides a
/// package's, is none.
fn read(path: &Path) -> Option<Descriptor> {
    let small = |metadata: &fs::Metadata| metadata.is_file() && metadata.len() <= LARGEST;
    fs::metadata(path).ok().filter(small)?;
    let text = fs::read_to_string(path).ok()?;
    serde_json::from_str(&text)
        .inspect_err(|error| log::debug!("{}: {error}", path.display()))
        .ok()
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Descriptor {
    #[serde(default)]
    interface_types: Vec<String>,
    mapping: FlashMapping,
    #[serde(default)]
    targets: Vec<Target>,
    #[serde(default)]
    features: Vec<String>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct FlashMapping {
    device: String,
    executable: Option<FlashFile>,
    nvram_template: Option<FlashFile>,
}

#[derive(Debug, Deserialize)]
struct FlashFile {
    filename: PathBuf,
    #[serde(default)]
    format: String,
}

#[derive(Debug, Deserialize)]
struct Target {
    architecture: String,
    #[serde(default)]
    machines: Vec<String>,
}

impl Descriptor {
    fn has(&self, feature: &str) -> bool {
        self.features.iter().any(|word| word == feature)
    }

    /// Whether it is UEFI for a board like this one, in flash, with files as they lie in it.
    fn fits(&self) -> bool {
        let board = |target: &Target| {
            target.architecture == "x86_64"
                && target.machines.iter().any(|name| name.contains("q35"))
        };
        let raw = |file: &Option<FlashFile>| {
            let format = file.as_ref().map(|file| file.format.as_str());
            matches!(format, Some("raw" | ""))
        };
        self.interface_types.iter().any(|kind| kind == "uefi")
            && self.mapping.device == "flash"
            && self.targets.iter().any(board)
            && raw(&self.mapping.executable)
            && raw(&self.mapping.nvram_template)
    }

    fn needs_smm(&self) -> bool {
        self.has("requires-smm")
    }

    /// Code and template.
    fn files(&self, roots: &FirmwareRoots) -> Option<(PathBuf, PathBuf)> {
        let code = self.mapping.executable.as_ref()?;
        let template = self.mapping.nvram_template.as_ref()?;
        Some((roots.file(&code.filename), roots.file(&template.filename)))
    }
}

/// What packages say of their firmware.
pub(super) struct Descriptors<'a> {
    roots: &'a FirmwareRoots,
    known: Vec<Descriptor>,
}

impl Descriptors<'_> {
    /// The first that this machine can be started with, and the template of its variables.
    pub(super) fn choose(&self) -> Result<(PathBuf, Option<PathBuf>), FirmwareError> {
        let works = self
            .known
            .iter()
            .filter(|one| one.fits() && !one.needs_smm());
        let mut files = works.filter_map(|one| one.files(self.roots));
        files
            .find(|(code, template)| code.is_file() && template.is_file())
            .map(|(code, template)| (code, Some(template)))
            .ok_or_else(|| {
                let folders = FOLDERS.map(|folder| self.roots.root.join(folder));
                FirmwareError::NotInstalled {
                    looked: folders
                        .map(|folder| folder.display().to_string())
                        .join(", "),
                }
            })
    }

    /// Refuses a build that needs system management mode: by what its package says, or by the name that all
    /// distributions give such builds.
    pub(super) fn refuse_smm(&self, path: &Path) -> Result<(), FirmwareError> {
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let described = self.known.iter().any(|one| {
            let files = one.files(self.roots);
            one.needs_smm() && files.is_some_and(|(code, _)| same(&code, &real))
        });
        let name = real.file_name().unwrap_or_default().to_string_lossy();
        let named = name.contains("secboot") && !name.contains("VARS");
        if !described && !named {
            return Ok(());
        }
        let instead = match self.choose() {
            Ok((code, _)) => code.display().to_string(),
            Err(_) => "OVMF_CODE_4M.fd".to_owned(),
        };
        Err(FirmwareError::NeedsSmm {
            path: path.to_owned(),
            instead,
        })
    }

    /// The template of the variables of the firmware at `path`, where a package says which it is.
    pub(super) fn template_of(&self, path: &Path) -> Option<PathBuf> {
        let real = fs::canonicalize(path).ok()?;
        let files = self.known.iter().filter_map(|one| one.files(self.roots));
        files
            .filter(|(code, template)| same(code, &real) && template.is_file())
            .map(|(_, template)| template)
            .next()
    }
}

fn same(path: &Path, real: &Path) -> bool {
    fs::canonicalize(path).is_ok_and(|path| path == real)
}

/// The template that lies beside the code and is named like it: `OVMF_VARS_4M.fd` for `OVMF_CODE_4M.fd`.
pub(super) fn template_beside(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let other = name.replacen("CODE", "VARS", 1);
    let template = path.with_file_name(&other);
    (other != name && template.is_file()).then_some(template)
}
