//! A swtpm that does as a script says. Its TPM counts how often it was measured into since it was switched on.

use std::collections::HashMap;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};

use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

const MEASURING: u8 = 0x77;
/// The code of a command that is answered with itself.
pub(super) const ECHO: u8 = 0x78;
pub(super) const MEASURE: [u8; 10] = [0x80, 1, 0, 0, 0, 10, 0, 0, 0, MEASURING];

/// The answer to [`MEASURE`].
pub(super) fn measured(times: u8) -> Vec<u8> {
    vec![0x80, 1, 0, 0, 0, 13, 0, 0, 0, 0, 0, 1, times]
}

/// What swtpm is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum What {
    /// By the control channel, with this number.
    Control(u32),
    /// A command to its TPM.
    Command,
}

/// How it answers.
#[derive(Clone, Debug)]
pub(super) enum Vice {
    Silent,
    Close,
    Says(Vec<u8>),
    /// When it is told that the command is cancelled, and then that it was.
    UntilCancelled,
}

#[derive(Debug, Default)]
struct Script {
    vices: HashMap<What, Vice>,
    /// Numbers of control commands.
    asked: Vec<u32>,
    connections: usize,
    commands: usize,
    measured: u8,
}

#[derive(Debug, Default)]
struct Shared {
    script: Mutex<Script>,
    changed: Condvar,
}

impl Shared {
    fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }
}

#[derive(Debug)]
pub(super) struct Fake {
    _folder: tempfile::TempDir,
    socket: std::path::PathBuf,
    shared: Arc<Shared>,
    stop: EventFd,
    thread: Option<JoinHandle<()>>,
}

impl Fake {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let mut fake = Self {
            socket: folder.path().join("s"),
            _folder: folder,
            shared: Arc::default(),
            stop: EventFd::new().unwrap(),
            thread: None,
        };
        fake.revive();
        fake
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn set(&self, what: What, vice: Option<Vice>) {
        let mut script = self.shared.script();
        match vice {
            Some(vice) => script.vices.insert(what, vice),
            None => script.vices.remove(&what),
        };
    }

    pub(super) fn asked(&self) -> Vec<u32> {
        self.shared.script().asked.clone()
    }

    pub(super) fn connections(&self) -> usize {
        self.shared.script().connections
    }

    /// Waits until it has been given a command, beside that of the start.
    pub(super) fn wait_for_command(&self) {
        let script = self.shared.script();
        let _commanded = self
            .shared
            .changed
            .wait_while(script, |script| script.commands < 2)
            .unwrap();
    }

    pub(super) fn die(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        let _signals = self.stop.take();
        let _gone = std::fs::remove_file(&self.socket);
    }

    pub(super) fn revive(&mut self) {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let (shared, stop) = (self.shared.clone(), self.stop.clone());
        self.thread = Some(thread::spawn(move || serve(&listener, &shared, &stop)));
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.die();
    }
}

fn serve(listener: &UnixListener, shared: &Shared, stop: &EventFd) {
    loop {
        let mut fds = [
            PollFd::new(listener, PollFlags::IN),
            PollFd::new(stop, PollFlags::IN),
        ];
        poll(&mut fds, None).unwrap();
        if !fds[1].revents().is_empty() {
            return;
        }
        let (control, _) = listener.accept().unwrap();
        shared.script().connections += 1;
        let mut served = Served {
            shared,
            control,
            data: None,
            held: false,
        };
        while served.turn(stop) {}
    }
}

/// A connection.
struct Served<'a> {
    shared: &'a Shared,
    control: UnixStream,
    data: Option<UnixStream>,
    /// A command waits to be cancelled.
    held: bool,
}

impl Served<'_> {
    /// Whether to go on.
    fn turn(&mut self, stop: &EventFd) -> bool {
        let mut fds = vec![
            PollFd::new(stop, PollFlags::IN),
            PollFd::new(&self.control, PollFlags::IN),
        ];
        fds.extend(
            self.data
                .as_ref()
                .map(|data| PollFd::new(data, PollFlags::IN)),
        );
        poll(&mut fds, None).unwrap();
        let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        // As swtpm does, what is on the data channel comes first.
        !ready[0]
            && (ready.get(2) != Some(&true) || self.command())
            && (!ready[1] || self.control())
    }

    fn vice(&self, what: What) -> Option<Vice> {
        self.shared.script().vices.get(&what).cloned()
    }

    fn command(&mut self) -> bool {
        let Some(mut data) = self.data.as_ref() else {
            return false;
        };
        let mut command = vec![0; 10];
        if data.read_exact(&mut command).is_err() {
            return false;
        }
        let size = u32::from_be_bytes(command[2..6].try_into().unwrap());
        command.resize(size as usize, 0);
        data.read_exact(&mut command[10..]).unwrap();
        let answer = match self.vice(What::Command) {
            None => self.carry_out(&command),
            Some(Vice::Close) => return false,
            Some(Vice::Says(bytes)) => bytes,
            Some(Vice::Silent) => Vec::new(),
            Some(Vice::UntilCancelled) => {
                self.held = true;
                Vec::new()
            }
        };
        self.shared.script().commands += 1;
        self.shared.changed.notify_all();
        data.write_all(&answer).is_ok()
    }

    fn carry_out(&self, command: &[u8]) -> Vec<u8> {
        match command[9] {
            MEASURING => {
                let mut script = self.shared.script();
                script.measured += 1;
                measured(script.measured)
            }
            ECHO => command.to_vec(),
            // TPM_RC_INITIALIZE, as before TPM2_Startup.
            _ => vec![0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0],
        }
    }

    fn control(&mut self) -> bool {
        let mut head = [0; 4];
        let mut files = Vec::new();
        {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
            let mut ancillary = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut head)];
            match recvmsg(
                &self.control,
                &mut slices,
                &mut ancillary,
                RecvFlags::WAITALL,
            ) {
                Ok(received) if received.bytes == 4 => {}
                _ => return false,
            }
            for message in ancillary.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    files.extend(descriptors);
                }
            }
        }
        let command = u32::from_be_bytes(head);
        self.shared.script().asked.push(command);
        let mut body = [0; 4];
        if matches!(command, 2 | 17) && self.control.read_exact(&mut body).is_err() {
            return false;
        }
        let answer = match self.vice(What::Control(command)) {
            Some(Vice::Close) => return false,
            Some(Vice::Says(bytes)) => bytes,
            Some(_) => Vec::new(),
            None => self.obey(command, u32::from_be_bytes(body), files),
        };
        self.control.write_all(&answer).is_ok()
    }

    fn obey(&mut self, command: u32, body: u32, mut files: Vec<std::os::fd::OwnedFd>) -> Vec<u8> {
        match command {
            1 => 0xffff_u64.to_be_bytes().to_vec(),
            2 => {
                assert_eq!(body, 0);
                self.shared.script().measured = 0;
                vec![0; 4]
            }
            4 => vec![0; 8],
            9 => {
                if std::mem::take(&mut self.held) {
                    let mut data = self.data.as_ref().unwrap();
                    data.write_all(&[0x80, 1, 0, 0, 0, 10, 0, 0, 9, 9]).unwrap();
                }
                vec![0; 4]
            }
            14 => vec![0; 4],
            16 => {
                self.data = Some(files.remove(0).into());
                vec![0; 4]
            }
            17 => [0, body, 0xaf8, 0x1000].map(u32::to_be_bytes).concat(),
            other => panic!("{other}"),
        }
    }
}
