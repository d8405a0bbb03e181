//! What binding asks of the kernel, as a trait so that a test can stand in for it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use super::netlink::{self, VfSetting, VfState};
use crate::{files, sys};

/// The changes that binding makes to a host.
pub trait Kernel {
    /// Writes `value` to a sysfs attribute, in one write.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    fn write(&mut self, attribute: &Path, value: &str) -> io::Result<()>;

    /// Loads a module, by its name or a device's `modalias`, with what it depends on.
    ///
    /// # Errors
    ///
    /// Where there is no such module, or it cannot be loaded.
    fn load_module(&mut self, name: &str) -> io::Result<()>;

    /// Gives a character device's node to a user.
    ///
    /// # Errors
    ///
    /// Where it is not there, is a link or no character device, or the caller may not.
    fn own(&mut self, node: &Path, user: u32) -> io::Result<()>;

    /// Waits until udev is done with the devices that are new, whose nodes it opens and gives owners; not
    /// for ever.
    fn wait_for_udev(&mut self);

    /// Who has a node.
    ///
    /// # Errors
    ///
    /// Where it is not there.
    fn owner(&self, node: &Path) -> io::Result<u32>;

    /// Sets a virtual function of the network interface with this index.
    ///
    /// # Errors
    ///
    /// The driver's answer.
    fn set_vf(&mut self, interface: u32, vf: u32, setting: VfSetting) -> io::Result<()>;

    /// What the virtual functions of the network interface with this index are set to, by number.
    ///
    /// # Errors
    ///
    /// The kernel's answer.
    fn vf_states(&self, interface: u32) -> io::Result<BTreeMap<u32, VfState>>;

    /// Writes a file whole or not at all, for good before it returns, and its folder if need be.
    ///
    /// # Errors
    ///
    /// The file system's answer.
    fn save(&mut self, path: &Path, text: &str, readers: Readers) -> io::Result<()>;

    /// Whose something is, and who can write it; of a symbolic link the link's.
    ///
    /// # Errors
    ///
    /// Where it is not there, or cannot be looked at.
    fn standing(&self, path: &Path) -> io::Result<Standing>;

    /// Removes a file. One that is not there is as wanted.
    ///
    /// # Errors
    ///
    /// The file system's answer.
    fn remove(&mut self, path: &Path) -> io::Result<()>;
}

/// Who may read a file that Busway writes. Only its owner can write it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Readers {
    /// Its owner alone.
    Owner,
    /// Everybody.
    Everybody,
}

/// Whose a file or folder is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// The user id of its owner.
    pub owner: u32,
    /// Its permission bits. chmod(2)
    pub mode: u32,
    /// Whether it is a symbolic link.
    pub is_link: bool,
}

/// The running kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinuxKernel;

impl Kernel for LinuxKernel {
    fn write(&mut self, attribute: &Path, value: &str) -> io::Result<()> {
        // Neither created nor truncated: an attribute is there or it is not.
        let mut file = OpenOptions::new().write(true).open(attribute)?;
        // The kernel takes each write as a whole value.
        match file.write(value.as_bytes())? {
            n if n == value.len() => Ok(()),
            n => Err(io::Error::new(
                io::ErrorKind::WriteZero,
                format!("only {n} bytes of {} were taken", value.len()),
            )),
        }
    }

    fn load_module(&mut self, name: &str) -> io::Result<()> {
        let run = |program: &str| -> io::Result<Output> {
            Command::new(program)
                .args(["--", name])
                .stdin(Stdio::null())
                .output()
        };
        // Not every user's PATH has the system's programs.
        let output = match run("modprobe") {
            Err(error) if error.kind() == io::ErrorKind::NotFound => run("/sbin/modprobe"),
            other => other,
        }
        .map_err(|error| io::Error::new(error.kind(), format!("cannot run modprobe: {error}")))?;
        if output.status.success() {
            return Ok(());
        }
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(io::Error::other(if said.is_empty() {
            format!("modprobe ended with {}", output.status)
        } else {
            said
        }))
    }

    fn own(&mut self, node: &Path, user: u32) -> io::Result<()> {
        sys::give_to(&files::open_node(node)?, user)
    }

    fn wait_for_udev(&mut self) {
        // It is there while udev has something to do (libudev, udev_queue_get_queue_is_empty). Its
        // rules set owners, and one of somebody else's may take its time.
        let busy = Path::new("/run/udev/queue");
        let deadline = Instant::now() + Duration::from_secs(3);
        while busy.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn owner(&self, node: &Path) -> io::Result<u32> {
        Ok(files::open_node(node)?.metadata()?.uid())
    }

    fn set_vf(&mut self, interface: u32, vf: u32, setting: VfSetting) -> io::Result<()> {
        netlink::set(interface, vf, setting)
    }

    fn vf_states(&self, interface: u32) -> io::Result<BTreeMap<u32, VfState>> {
        netlink::states(interface)
    }

    fn save(&mut self, path: &Path, text: &str, readers: Readers) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        let mut name = path.file_name().unwrap_or_default().to_owned();
        // udev and others read only names that end as they should.
        name.push(".new");
        let mode = match readers {
            Readers::Owner => 0o600,
            Readers::Everybody => 0o644,
        };
        files::replace_for_good(path, &path.with_file_name(name), text.as_bytes(), mode)?;
        sync_folder(path)
    }

    fn standing(&self, path: &Path) -> io::Result<Standing> {
        let there = fs::symlink_metadata(path)?;
        Ok(Standing {
            owner: there.uid(),
            mode: there.mode() & 0o7777,
            is_link: there.is_symlink(),
        })
    }

    fn remove(&mut self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => sync_folder(path),
        }
    }
}

/// Has a folder's entries be as they are now after a crash too.
fn sync_folder(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(folder) => File::open(folder)?.sync_all(),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_written_whole_and_removed_twice() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/devices.json");
        LinuxKernel.save(&path, "first", Readers::Owner).unwrap();
        LinuxKernel.save(&path, "second", Readers::Owner).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), "second");
        let names: Vec<_> = fs::read_dir(path.parent().unwrap()).unwrap().collect();
        assert_eq!(names.len(), 1, "{names:?}");
        LinuxKernel.remove(&path).unwrap();
        LinuxKernel.remove(&path).unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn an_attribute_that_is_not_there_is_not_made() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("driver_override");
        let error = LinuxKernel.write(&path, "vfio-pci").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotFound);
        assert!(!path.exists());
    }
}
