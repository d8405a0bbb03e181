//! A file that keeps the end of a console's output and does not grow for ever: a guest decides how much
//! it writes there, and must not fill the host's disk.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use busway_host::files::{self, Existing, Output, OutputError};
use busway_iommu::effective_user;

use crate::outflow::write_all;

/// A file and the one before it, `PATH.1`, of at most so many bytes each.
///
/// When the next bytes would exceed the size, `PATH` becomes `PATH.1` (what had that name before is gone)
/// and begins anew. Where that cannot be, the file is emptied. What is no regular file, such as a pipe,
/// keeps nothing and is not bounded.
#[derive(Debug)]
pub(super) struct KeptFile {
    file: File,
    path: PathBuf,
    /// Bytes in the file; `None`: it keeps nothing.
    length: Option<u64>,
    most: u64,
    /// It was said that the file could not be moved.
    complained: bool,
    /// Bytes that there was no room for in the file system, since it was full.
    lost: u64,
}

impl KeptFile {
    /// Opens `path`, and empties it where it is there already.
    ///
    /// # Errors
    ///
    /// As [`files::open_output`].
    pub(super) fn open(path: &Path, most: u64) -> Result<Self, OutputError> {
        let Output { file, named } = files::open_output(path, Existing::Empty)?;
        Ok(Self {
            file,
            path: path.to_owned(),
            length: named.then_some(0),
            most,
            complained: false,
            lost: 0,
        })
    }

    /// Writes all of `bytes`, which are fewer than the file may have. What a full file system has no room for is lost,
    /// which is said once, and in the file when there is room again.
    pub(super) fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let written = match self.lost {
            0 => self.write(bytes),
            lost => {
                let notice = format!("\r\n[busway: {lost} bytes of output lost here]\r\n");
                self.write(&[notice.as_bytes(), bytes].concat())
            }
        };
        let lost = bytes.len() as u64;
        match written {
            Ok(()) => self.lost = 0,
            Err(error) if is_full(&error) => {
                if self.lost == 0 {
                    let path = self.path.display();
                    let remedy = files::no_room(&error);
                    log::warn!(
                        "{path}: {error}: the console's output is lost until there is room{remedy}"
                    );
                }
                self.lost = self.lost.saturating_add(lost);
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        let more = bytes.len() as u64;
        if let Some(length) = self.length
            && length > 0
            && length.saturating_add(more) > self.most
        {
            self.begin_anew()?;
            self.length = Some(0);
        }
        write_all(&self.file, bytes)?;
        self.length = self.length.map(|length| length.saturating_add(more));
        Ok(())
    }

    fn begin_anew(&mut self) -> io::Result<()> {
        match self.move_away() {
            Ok(next) => self.file = next,
            Err(error) => {
                if !self.complained {
                    self.complained = true;
                    let (path, before) = (self.path.display(), self.before());
                    let before = before.display();
                    log::warn!(
                        "{path} is full, cannot be kept as {before}, and begins anew: {error}"
                    );
                }
                self.file.set_len(0)?;
            }
        }
        Ok(())
    }

    /// The name of the file before this one.
    fn before(&self) -> PathBuf {
        let mut name = self.path.clone().into_os_string();
        name.push(".1");
        name.into()
    }

    /// Gives the file its other name, and makes the next one.
    fn move_away(&self) -> io::Result<File> {
        let before = self.before();
        match fs::symlink_metadata(&before) {
            Ok(there) if !there.is_file() || there.uid() != effective_user() => {
                return Err(io::Error::other(
                    "what has that name is not a file of Busway's user",
                ));
            }
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let own = self.file.metadata()?;
        // Somebody else may have moved it already, as logrotate does.
        match fs::symlink_metadata(&self.path) {
            Ok(there) if (there.dev(), there.ino()) == (own.dev(), own.ino()) => {
                fs::rename(&self.path, &before)?;
            }
            Ok(_) => return Err(io::Error::other("another file has taken its name")),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
        files::create_new(&self.path, own.mode() & 0o777)
    }
}

/// There is no room for it: on the file system, for its user, or for the process.
fn is_full(error: &io::Error) -> bool {
    files::is_no_room(error) || error.kind() == io::ErrorKind::FileTooLarge
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use proptest::prelude::*;

    use super::*;

    const MOST: u64 = 100;

    fn text(path: &Path) -> String {
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_file_that_is_full_is_kept_once_and_begins_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        fs::write(&path, "from an earlier run").unwrap();
        let mut file = KeptFile::open(&path, MOST).unwrap();
        for number in 0..25 {
            file.write_all(format!("{number:>9}\n").as_bytes()).unwrap();
        }
        let lines = |path: &Path| -> Vec<u32> {
            let text = text(path);
            text.lines()
                .map(|line| line.trim().parse().unwrap())
                .collect()
        };
        assert_eq!(lines(&path), [20, 21, 22, 23, 24]);
        let before = folder.path().join("serial.log.1");
        assert_eq!(lines(&before), (10..20).collect::<Vec<_>>());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2);
    }

    #[test]
    fn what_a_full_file_system_has_no_room_for_is_lost_and_is_said_when_there_is_some() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("serial.log");
        let mut file = KeptFile::open(&path, MOST).unwrap();
        file.write_all(b"first").unwrap();
        let room = std::mem::replace(
            &mut file.file,
            File::options().write(true).open("/dev/full").unwrap(),
        );
        file.write_all(b"lost").unwrap();
        file.write_all(b"as well").unwrap();
        file.file = room;
        file.write_all(b"last").unwrap();
        let said = "first\r\n[busway: 11 bytes of output lost here]\r\nlast";
        assert_eq!(text(&path), said);
    }

    #[test]
    fn a_file_that_cannot_be_moved_is_emptied() {
        let ways: [fn(&Path, &Path); 3] = [
            |_, before| fs::create_dir(before).unwrap(),
            |_, before| symlink("victim", before).unwrap(),
            |path, _| {
                fs::remove_file(path).unwrap();
                fs::write(path, "another's").unwrap();
            },
        ];
        for way in ways {
            let folder = tempfile::tempdir().unwrap();
            let (path, before) = (folder.path().join("a"), folder.path().join("a.1"));
            fs::write(folder.path().join("victim"), "secret").unwrap();
            let mut file = KeptFile::open(&path, MOST).unwrap();
            file.write_all(b"first").unwrap();
            way(&path, &before);
            for _ in 0..50 {
                file.write_all(&[b'x'; 30]).unwrap();
                assert!(file.file.metadata().unwrap().len() <= MOST);
            }
            assert_eq!(text(&folder.path().join("victim")), "secret");
        }
    }

    #[test]
    fn a_file_that_somebody_has_moved_is_made_anew() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        let mut file = KeptFile::open(&path, MOST).unwrap();
        file.write_all(&[b'x'; 90]).unwrap();
        fs::rename(&path, folder.path().join("elsewhere")).unwrap();
        file.write_all(&[b'y'; 20]).unwrap();
        assert_eq!(text(&path), "y".repeat(20));
    }

    proptest! {
        #[test]
        fn no_output_is_more_than_two_files_hold(sizes in prop::collection::vec(1..=MOST as usize, 0..60)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("a");
            let mut file = KeptFile::open(&path, MOST).unwrap();
            let mut all = Vec::new();
            for (number, size) in sizes.into_iter().enumerate() {
                let bytes = vec![number as u8; size];
                file.write_all(&bytes).unwrap();
                all.extend(bytes);
                let mut kept = fs::read(folder.path().join("a.1")).unwrap_or_default();
                prop_assert!(kept.len() as u64 <= MOST);
                let last = fs::read(&path).unwrap();
                prop_assert!(last.len() as u64 <= MOST);
                kept.extend(last);
                prop_assert!(all.ends_with(&kept), "what is kept is the end");
            }
        }
    }
}
