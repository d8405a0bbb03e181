//! Whether somebody can still reach this process whose socket and pipe of events another program made.
//!
//! A program that makes both, starts a process for them and then removes both names has given the process up: nobody
//! can ask anything of it any more, nor hear of it. libvirt ends a VM so: its `ch` driver, up to 11.7, removes the
//! names and sends no signal, as the process is not its child (`virCHProcessStop`, `virProcessAbort`); after
//! that it takes the VM's host devices away.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use rustix::io::Errno;

/// The names by which a process is reached.
#[derive(Debug)]
pub(super) struct Names {
    inotify: OwnedFd,
    files: Vec<Name>,
}

#[derive(Debug)]
struct Name {
    path: PathBuf,
    /// Device and inode, for another process may be given the same name.
    identity: (u64, u64),
}

impl Names {
    /// Watches these files. Nothing where one of them cannot be seen from here, as in another mount namespace: then
    /// nobody knows what becomes of it.
    ///
    /// # Errors
    /// inotify(7)
    pub(super) fn watch(paths: &[&Path]) -> io::Result<Option<Self>> {
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        let mut files = Vec::new();
        for &path in paths {
            let Some(identity) = identity(path).filter(|_| path.is_absolute()) else {
                return Ok(None);
            };
            // A socket's inode lives as long as it listens, and only tells that it has a name less.
            let changes = WatchFlags::ATTRIB | WatchFlags::DELETE_SELF | WatchFlags::MOVE_SELF;
            match inotify::add_watch(&inotify, path, changes) {
                Ok(_) => {}
                Err(Errno::NOENT) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
            let path = path.to_owned();
            files.push(Name { path, identity });
        }
        Ok(Some(Self { inotify, files }))
    }

    /// Waits until all the names are gone; `false` where `stop` is signalled before.
    ///
    /// # Errors
    /// poll(2), and read(2) of an inotify(7)
    pub(super) fn wait_gone(&self, stop: &EventFd) -> io::Result<bool> {
        let mut events = [0; 4096];
        loop {
            let is_there = |name: &Name| identity(&name.path) == Some(name.identity);
            if !self.files.iter().any(is_there) {
                return Ok(true);
            }
            let mut ready = [
                PollFd::new(&self.inotify, PollFlags::IN),
                PollFd::new(stop, PollFlags::IN),
            ];
            match poll(&mut ready, None) {
                Err(Errno::INTR) => continue,
                result => result?,
            };
            if !ready[1].revents().is_empty() {
                return Ok(false);
            }
            // What has happened is found by looking: it is only taken away here.
            match rustix::io::read(&self.inotify, &mut events) {
                Ok(_) | Err(Errno::AGAIN | Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    let there = fs::symlink_metadata(path).ok()?;
    Some((there.dev(), there.ino()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread;

    use super::*;

    #[test]
    fn names_are_gone_when_the_last_is_removed_or_is_another_files() {
        let folder = tempfile::tempdir().unwrap();
        let [socket, pipe] = ["socket", "pipe"].map(|name| folder.path().join(name));
        let listener = UnixListener::bind(&socket).unwrap();
        assert!(Names::watch(&[&socket, &pipe]).unwrap().is_none());
        fs::write(&pipe, "").unwrap();
        let names = Names::watch(&[&socket, &pipe]).unwrap().unwrap();
        let stopped = EventFd::new().unwrap();
        stopped.signal();
        assert!(!names.wait_gone(&stopped).unwrap());
        // One of them alone is no sign, whether the name is nobody's or somebody else's by now. The socket still listens.
        fs::remove_file(&socket).unwrap();
        assert!(!names.wait_gone(&stopped).unwrap());
        fs::write(&socket, "").unwrap();
        assert!(!names.wait_gone(&stopped).unwrap());
        let stop = EventFd::new().unwrap();
        thread::scope(|scope| {
            let gone = scope.spawn(|| names.wait_gone(&stop).unwrap());
            fs::remove_file(&pipe).unwrap();
            assert!(gone.join().unwrap());
        });
        drop(listener);
    }

    #[test]
    fn a_name_that_means_another_file_elsewhere_is_not_watched() {
        assert!(Names::watch(&[Path::new("Cargo.toml")]).unwrap().is_none());
    }
}
