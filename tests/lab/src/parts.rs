//! Where the lab's parts are: the Debian root, the kernels and the images that `setup/setup` makes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

/// The parts' folders, all of them in one cache folder.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The cache folder itself, which the emulated host sees as `/cache`.
    pub cache: PathBuf,
    /// The Debian root: QEMU runs from it, and it is the emulated host's own file system.
    pub root: PathBuf,
    /// Debian's stock kernel: `bzImage`, and its modules under `lib/modules`.
    pub stock: PathBuf,
    /// The small kernel: `bzImage`, and `vmlinux` for the PVH entry.
    pub small: PathBuf,
    /// The backports kernel: `bzImage`. Nothing where it was not asked for.
    pub backports: PathBuf,
    /// The initramfs images.
    pub images: PathBuf,
}

/// How much of the lab has to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All but the kernels that are built, which takes long.
    Stock,
    /// That and the backports kernel.
    Backports,
    /// That of [`Stock`](Self::Stock) and the small kernel.
    Full,
    /// Everything.
    All,
}

impl Parts {
    /// Makes what is missing, which can take many minutes the first time, and says where everything is.
    pub fn prepare(extent: Extent) -> Result<Self> {
        let mut setup = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("setup/setup"));
        setup.args(match extent {
            Extent::Stock => Some("--stock"),
            Extent::Backports => Some("--backports"),
            Extent::Full => None,
            Extent::All => Some("--all"),
        });
        let output = setup
            .stderr(Stdio::inherit())
            .output()
            .context("cannot run tests/lab/setup/setup")?;
        if !output.status.success() {
            bail!("the lab's set-up failed; its last lines above tell why");
        }
        let text = String::from_utf8(output.stdout)?;
        let mut folders: BTreeMap<&str, &str> = text
            .lines()
            .filter_map(|line| line.split_once('='))
            .collect();
        let mut folder = |name| {
            let path = folders
                .remove(name)
                .with_context(|| format!("the set-up named no {name}"))?;
            anyhow::Ok(PathBuf::from(path))
        };
        Ok(Self {
            cache: folder("cache")?,
            root: folder("root")?,
            stock: folder("stock")?,
            small: folder("small")?,
            backports: folder("backports")?,
            images: folder("images")?,
        })
    }

    /// Where the emulated host sees a file of the cache.
    pub fn inside(&self, path: &Path) -> PathBuf {
        let relative = path
            .strip_prefix(&self.cache)
            .expect("the parts are in the cache");
        Path::new("/cache").join(relative)
    }
}
