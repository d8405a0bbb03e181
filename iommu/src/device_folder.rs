//! A host device's folder in sysfs, opened once.
//!
//! What is read by it is the device's that was opened. A path would lead to whoever has the address by then, such as a
//! virtual function that was made anew; and where the process has no `/sys` any more, a path leads nowhere.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, open, openat};

/// Most bytes of a file that are read: sysfs has a page for each. linux/Documentation/filesystems/sysfs.rst
const MOST: u64 = 4096;

/// The folder of a device, which stays what it is when its name becomes another's.
#[derive(Debug)]
pub struct DeviceFolder {
    path: PathBuf,
    /// Nothing where it could not be opened: then nothing can be read of it either.
    folder: Option<OwnedFd>,
}

impl DeviceFolder {
    /// Opens the folder at `path`. Where there is none, nothing is read of it.
    #[must_use]
    pub fn open(path: &Path) -> Self {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Self {
            path: path.to_owned(),
            folder: open(path, flags, Mode::empty()).ok(),
        }
    }

    /// Where it was when it was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Opens a file of the device's to be read; a name may lead to a device above, by `..`.
    ///
    /// # Errors
    /// The kernel's, such as ENOENT where the device is gone.
    pub fn file(&self, name: &str) -> io::Result<File> {
        let folder = self.folder.as_ref().ok_or(io::ErrorKind::NotFound)?;
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        Ok(openat(folder, name, flags, Mode::empty())?.into())
    }

    /// What a file of the device's says; nothing where it has no such file.
    #[must_use]
    pub fn text(&self, name: &str) -> Option<String> {
        let mut text = String::new();
        let mut file = self.file(name).ok()?.take(MOST);
        file.read_to_string(&mut text).ok()?;
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn what_is_read_is_the_device_s_that_was_opened_whoever_has_its_name_later() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("0000:01:00.0");
        let make = |text| {
            fs::create_dir(&path).unwrap();
            fs::write(path.join("numa_node"), text).unwrap();
        };
        assert_eq!(DeviceFolder::open(&path).text("numa_node"), None);
        make("0\n");
        let folder = DeviceFolder::open(&path);
        assert_eq!(folder.text("numa_node").as_deref(), Some("0\n"));
        assert_eq!(folder.text("reset_method"), None);
        fs::rename(&path, root.path().join("gone")).unwrap();
        make("1\n");
        assert_eq!(folder.text("numa_node").as_deref(), Some("0\n"));
        fs::remove_dir_all(root.path().join("gone")).unwrap();
        assert_eq!(folder.text("numa_node"), None);
        assert_eq!(folder.path(), path);
    }
}
