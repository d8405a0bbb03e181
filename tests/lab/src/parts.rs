//! Where the lab's parts are: the Debian root, the kernels and the images that `setup/setup` makes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};

use crate::config::Kernel;
use crate::emulator;

/// The parts' folders, all of them in one cache folder.
#[derive(Debug, Clone)]
pub struct Parts {
    /// The cache folder itself, which the emulated host sees as `/cache`.
    pub cache: PathBuf,
    /// The Debian root, which QEMU runs from.
    pub root: PathBuf,
    /// That QEMU.
    pub(crate) emulator: PathBuf,
    /// Debian's stock kernel: `bzImage`, and `vmlinux` for the PVH entry.
    pub stock: PathBuf,
    /// The kernel of Debian's backports: `bzImage`. Nothing where it could not be made.
    pub backports: Option<PathBuf>,
    /// The initramfs images.
    pub images: PathBuf,
    /// The emulated host's disk, `root.erofs`: the Debian root, and what guests boot from.
    pub disk: PathBuf,
    /// libvirt with its `ch` driver: `libvirt.tar`, for a host that wants it. Nothing where it could not be made.
    pub libvirt: Option<PathBuf>,
}

impl Parts {
    /// Makes what is missing, which takes some minutes the first time, and says where everything is. A process looks
    /// once.
    pub fn prepare() -> Result<Self> {
        static PREPARED: Mutex<Option<Parts>> = Mutex::new(None);
        let mut prepared = PREPARED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(parts) = &*prepared {
            return Ok(parts.clone());
        }
        let parts = Self::set_up()?;
        *prepared = Some(parts.clone());
        Ok(parts)
    }

    fn set_up() -> Result<Self> {
        let text = run_set_up(&[])?;
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
        let root = folder("root")?;
        Ok(Self {
            cache: folder("cache")?,
            emulator: emulator::mended(&root)?,
            root,
            stock: folder("stock")?,
            backports: Some(folder("backports")?).filter(|path| !path.as_os_str().is_empty()),
            images: folder("images")?,
            disk: folder("disk")?,
            libvirt: Some(folder("libvirt")?).filter(|path| !path.as_os_str().is_empty()),
        })
    }

    /// The folder of `system.qcow2`, a disk with a whole Debian that nothing may write to. It is made where it is not there,
    /// after the rest.
    pub fn system(&self) -> Result<PathBuf> {
        let said = run_set_up(&["system"])?;
        Ok(PathBuf::from(said.trim_end()))
    }

    /// A host kernel's bzImage, its initramfs, and the name of its set of modules on the host's disk.
    pub(crate) fn host_kernel(&self, kernel: Kernel) -> Result<(PathBuf, PathBuf, &'static str)> {
        let cores;
        let (folder, image, modules) = match kernel {
            Kernel::Stock => (Some(&self.stock), "host-stock.img", "stock"),
            Kernel::Iommufd => (Some(&self.stock), "host-stock.img", "iommufd"),
            Kernel::Backports => (self.backports.as_ref(), "host-backports.img", "backports"),
            Kernel::CoreScheduling => {
                cores = core_scheduling()?;
                (Some(&cores), "host-stock.img", "stock")
            }
        };
        let folder = folder.context("the set-up could not make the backports kernel")?;
        Ok((folder.join("bzImage"), self.images.join(image), modules))
    }

    /// Where the emulated host finds what a guest boots from: `bzImage`, `vmlinux`, `guest.img`, `guest-programs.img` or `guest-net.img`.
    pub fn inside(name: &str) -> String {
        format!("/boot/{name}")
    }
}

/// The folder of the kernel with core scheduling, which is made where it is not there. A process looks once.
fn core_scheduling() -> Result<PathBuf> {
    static FOLDER: Mutex<Option<PathBuf>> = Mutex::new(None);
    let mut folder = FOLDER.lock().unwrap_or_else(PoisonError::into_inner);
    let path = match folder.take() {
        Some(path) => path,
        None => PathBuf::from(run_set_up(&["cores"])?.trim_end()),
    };
    *folder = Some(path.clone());
    Ok(path)
}

fn run_set_up(words: &[&str]) -> Result<String> {
    let mut setup = Command::new(Path::new(env!("CARGO_MANIFEST_DIR")).join("setup/setup"));
    let output = setup
        .args(words)
        .stderr(Stdio::inherit())
        .output()
        .context("cannot run tests/lab/setup/setup")?;
    if !output.status.success() {
        bail!("the lab's set-up failed; its last lines above tell why");
    }
    Ok(String::from_utf8(output.stdout)?)
}
