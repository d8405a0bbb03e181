//! A back end on a thread: it speaks the protocol by its bytes, serves rings by what it is given of the guest's memory,
//! and can be told to behave badly.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use busway_vfio::EventFd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

/// Requests, by their numbers. QEMU, docs/interop/vhost-user.rst
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_OWNER: u32 = 3;
pub(super) const SET_MEM_TABLE: u32 = 5;
const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
const SET_VRING_CALL: u32 = 13;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const NET_SET_MTU: u32 = 20;
const SET_BACKEND_REQ_FD: u32 = 21;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;
pub(super) const GET_INFLIGHT_FD: u32 = 31;
pub(super) const SET_INFLIGHT_FD: u32 = 32;

const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// Protocol features.
pub(super) const MQ: u64 = 1;
pub(super) const REPLY_ACK: u64 = 1 << 3;
pub(super) const NET_MTU: u64 = 1 << 4;
pub(super) const BACKEND_REQ: u64 = 1 << 5;
pub(super) const CONFIG: u64 = 1 << 9;
pub(super) const INFLIGHT: u64 = 1 << 12;

/// What it does in the place of what was asked of it.
#[derive(Clone, Debug)]
pub(super) enum Vice {
    /// It does not answer.
    Silent,
    /// It ends the connection.
    Close,
    /// It says no.
    Refuse,
    /// It sends these bytes.
    Says(Vec<u8>),
    /// It sends a byte of its answer and no more.
    Stammer,
    /// It answers after this time.
    Late(Duration),
}

/// How it is, and what it has been asked.
#[derive(Debug)]
pub(super) struct Script {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) queues: u64,
    pub(super) config: Vec<u8>,
    pub(super) vices: BTreeMap<u32, Vice>,
    /// Requests are taken from the rings and not completed.
    pub(super) keeps: bool,
    /// The ring at whose beginning it dies, once, with the rings before it served.
    pub(super) dies_enabling: Option<u32>,
    /// All requests that came, over all connections.
    pub(super) asked: Vec<u32>,
    /// The channel to its front end.
    pub(super) channel: Option<UnixStream>,
    /// What it was given for its notes: each time the identity of the file.
    pub(super) inflight: Vec<u64>,
    /// The bases that rings were given.
    pub(super) bases: Vec<(u32, u32)>,
    /// The features that were set.
    pub(super) agreed: Vec<u64>,
    /// The rings that were enabled (1) and disabled (0).
    pub(super) enabled: Vec<(u32, u32)>,
    /// The MTUs that were said.
    pub(super) mtus: Vec<u64>,
}

/// The back end.
pub(super) struct Fake {
    pub(super) folder: TempDir,
    pub(super) script: Arc<Mutex<Script>>,
    running: Option<(EventFd, JoinHandle<()>)>,
}

impl Fake {
    /// Listens, and offers the usual: all protocol features and four queues.
    pub(super) fn start() -> Self {
        let script = Script {
            features: 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28 | 0xff_ffff,
            protocol: MQ | REPLY_ACK | NET_MTU | BACKEND_REQ | CONFIG | INFLIGHT,
            queues: 4,
            config: vec![7; 60],
            vices: BTreeMap::new(),
            keeps: false,
            dies_enabling: None,
            asked: Vec::new(),
            channel: None,
            inflight: Vec::new(),
            bases: Vec::new(),
            agreed: Vec::new(),
            enabled: Vec::new(),
            mtus: Vec::new(),
        };
        let mut fake = Self {
            folder: tempfile::tempdir().unwrap(),
            script: Arc::new(Mutex::new(script)),
            running: None,
        };
        fake.listen();
        fake
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(super) fn script(&self) -> std::sync::MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    /// How often somebody has begun to speak with it.
    pub(super) fn connections(&self) -> usize {
        let script = self.script();
        let asked = script.asked.iter();
        asked.filter(|request| **request == SET_OWNER).count()
    }

    /// Changes its manners from now on.
    pub(super) fn with(self, change: impl FnOnce(&mut Script)) -> Self {
        change(&mut self.script());
        self
    }

    /// Dies, with its connection.
    pub(super) fn die(&mut self) {
        if let Some((stop, thread)) = self.running.take() {
            stop.signal();
            thread.join().unwrap();
        }
    }

    /// Listens anew.
    pub(super) fn listen(&mut self) {
        let socket = self.socket();
        let _none = std::fs::remove_file(&socket);
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = EventFd::new().unwrap();
        let (script, ends) = (self.script.clone(), stop.clone());
        let thread = std::thread::spawn(move || {
            while wait(&listener, &ends) {
                let (stream, _) = listener.accept().unwrap();
                Server::new(stream, script.clone()).serve(&ends);
            }
            std::fs::remove_file(&socket).unwrap();
        });
        self.running = Some((stop, thread));
    }
}

impl Fake {
    /// Connects to who listens at its socket, and again whenever that connection has ended, in the place of listening.
    pub(super) fn call(&mut self) {
        self.die();
        let (socket, script) = (self.socket(), self.script.clone());
        let stop = EventFd::new().unwrap();
        let ends = stop.clone();
        let thread = std::thread::spawn(move || {
            loop {
                if let Ok(stream) = UnixStream::connect(&socket) {
                    Server::new(stream, script.clone()).serve(&ends);
                }
                let pause = Timespec::try_from(Duration::from_millis(5)).unwrap();
                let mut fds = [PollFd::new(&ends, PollFlags::IN)];
                poll(&mut fds, Some(&pause)).unwrap();
                if !fds[0].revents().is_empty() {
                    return;
                }
            }
        });
        self.running = Some((stop, thread));
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.die();
    }
}

/// Whether `fd` is ready before the end.
fn wait(fd: &impl AsFd, stop: &EventFd) -> bool {
    let mut fds = [
        PollFd::new(fd, PollFlags::IN),
        PollFd::new(stop, PollFlags::IN),
    ];
    poll(&mut fds, None).unwrap();
    fds[1].revents().is_empty()
}

struct Region {
    user: u64,
    size: u64,
    guest: u64,
    file: File,
}

#[derive(Default)]
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    next: u16,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    enabled: bool,
}

/// One connection.
struct Server {
    stream: UnixStream,
    script: Arc<Mutex<Script>>,
    regions: Vec<Region>,
    rings: BTreeMap<u32, Ring>,
}

impl Server {
    fn new(stream: UnixStream, script: Arc<Mutex<Script>>) -> Self {
        Self {
            stream,
            script,
            regions: Vec::new(),
            rings: BTreeMap::new(),
        }
    }

    fn serve(mut self, stop: &EventFd) {
        loop {
            let kicks = self.rings.iter().filter_map(|(number, ring)| {
                Some((*number, ring.kick.clone()?)).filter(|_| ring.enabled)
            });
            let kicks: Vec<_> = kicks.collect();
            let mut fds = vec![
                PollFd::new(&self.stream, PollFlags::IN),
                PollFd::new(stop, PollFlags::IN),
            ];
            fds.extend(
                kicks
                    .iter()
                    .map(|(_, kick)| PollFd::new(kick, PollFlags::IN)),
            );
            poll(&mut fds, None).unwrap();
            let ready: Vec<_> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(fds);
            if ready[1] {
                return;
            }
            for ((number, kick), _) in kicks.iter().zip(&ready[2..]).filter(|(_, ready)| **ready) {
                let _count = kick.take();
                self.serve_ring(*number);
            }
            if ready[0] && !self.take_request() {
                return;
            }
        }
    }

    /// Receives a message and answers it; says whether to go on.
    fn take_request(&mut self) -> bool {
        let mut head = [0; 12];
        let mut files = Vec::new();
        {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut slices = [IoSliceMut::new(&mut head)];
            let flags = RecvFlags::WAITALL;
            match recvmsg(&self.stream, &mut slices, &mut control, flags) {
                Ok(received) if received.bytes == 12 => {}
                _ => return false,
            }
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(descriptors) = message {
                    files.extend(descriptors);
                }
            }
        }
        let word = |at: usize| u32::from_ne_bytes(head[at..at + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(4), word(8));
        let mut body = vec![0; size as usize];
        if self.stream.read_exact(&mut body).is_err() {
            return false;
        }
        let vice = {
            let mut script = self.script.lock().unwrap();
            script.asked.push(request);
            script.vices.get(&request).cloned()
        };
        if request == SET_VRING_ENABLE && self.dies_at(&body) {
            return false;
        }
        let answer = self.answer(request, flags, &body, files);
        let message = answer.map(|body| {
            let head = [request, 1 | REPLY, body.len() as u32].map(u32::to_ne_bytes);
            [head.concat(), body].concat()
        });
        let bytes = match vice {
            None => message,
            Some(Vice::Silent) => None,
            Some(Vice::Close) => return false,
            Some(Vice::Refuse) => {
                let head = [request, 1 | REPLY, 8].map(u32::to_ne_bytes).concat();
                Some([head, 1_u64.to_ne_bytes().to_vec()].concat())
            }
            Some(Vice::Says(bytes)) => Some(bytes),
            Some(Vice::Stammer) => message.map(|message| message[..1].to_vec()),
            Some(Vice::Late(time)) => {
                std::thread::sleep(time);
                message
            }
        };
        bytes.is_none_or(|bytes| self.stream.write_all(&bytes).is_ok())
    }

    /// Whether it dies at the beginning of a ring: not before one that it serves has a request, which it completes.
    fn dies_at(&mut self, body: &[u8]) -> bool {
        let here = Some(u32::from_ne_bytes(body[..4].try_into().unwrap()));
        let dies = here == self.script.lock().unwrap().dies_enabling;
        if dies {
            self.script.lock().unwrap().dies_enabling = None;
            let first = *self.rings.keys().next().unwrap();
            while self.rings[&first].next == 0 {
                self.serve_ring(first);
            }
        }
        dies
    }

    /// The body of the answer, where one is due.
    fn answer(
        &mut self,
        request: u32,
        flags: u32,
        body: &[u8],
        mut files: Vec<OwnedFd>,
    ) -> Option<Vec<u8>> {
        let u32_at = |at: usize| u32::from_ne_bytes(body[at..at + 4].try_into().unwrap());
        let u64_at = |at: usize| u64::from_ne_bytes(body[at..at + 8].try_into().unwrap());
        let number = |value: u64| Some(value.to_ne_bytes().to_vec());
        let mut script = self.script.lock().unwrap();
        let rings = &mut self.rings;
        match request {
            GET_FEATURES => return number(script.features),
            GET_PROTOCOL_FEATURES => return number(script.protocol),
            GET_QUEUE_NUM => return number(script.queues),
            SET_MEM_TABLE => {
                let count = u32_at(0) as usize;
                let regions = files
                    .drain(..)
                    .enumerate()
                    .take(count)
                    .map(|(index, file)| {
                        let at = 8 + 32 * index;
                        assert_eq!(u64_at(at + 24), 0, "each has a file of its own");
                        Region {
                            guest: u64_at(at),
                            size: u64_at(at + 8),
                            user: u64_at(at + 16),
                            file: file.into(),
                        }
                    });
                self.regions = regions.collect();
            }
            SET_VRING_NUM => rings.entry(u32_at(0)).or_default().size = u32_at(4) as u16,
            SET_VRING_ADDR => {
                let ring = rings.entry(u32_at(0)).or_default();
                (ring.desc, ring.used, ring.avail) = (u64_at(8), u64_at(16), u64_at(24));
            }
            SET_VRING_BASE => {
                rings.entry(u32_at(0)).or_default().next = u32_at(4) as u16;
                script.bases.push((u32_at(0), u32_at(4)));
            }
            GET_VRING_BASE => {
                let index = u32_at(0);
                let ring = rings.entry(index).or_default();
                (ring.kick, ring.call, ring.enabled) = (None, None, false);
                let state = [index, ring.next.into()].map(u32::to_ne_bytes);
                return Some(state.concat());
            }
            SET_VRING_KICK => {
                let ring = rings.entry(u32_at(0)).or_default();
                ring.kick = files.pop().map(Into::into);
                // Without protocol features nothing else begins a ring.
                ring.enabled |= script.features & 1 << 30 == 0;
            }
            SET_VRING_CALL => {
                rings.entry(u32_at(0)).or_default().call = files.pop().map(Into::into)
            }
            SET_VRING_ENABLE => {
                rings.entry(u32_at(0)).or_default().enabled = u32_at(4) == 1;
                script.enabled.push((u32_at(0), u32_at(4)));
            }
            SET_FEATURES => script.agreed.push(u64_at(0)),
            NET_SET_MTU => script.mtus.push(u64_at(0)),
            SET_BACKEND_REQ_FD => script.channel = files.pop().map(Into::into),
            GET_CONFIG => {
                let mut answer = body.to_vec();
                let size = script.config.len().min(answer.len() - 12);
                answer[12..12 + size].copy_from_slice(&script.config[..size]);
                return Some(answer);
            }
            SET_CONFIG => {
                let (at, size) = (u32_at(0) as usize, u32_at(4) as usize);
                if script.vices.contains_key(&SET_CONFIG) {
                    return None;
                }
                script.config[at..at + size].copy_from_slice(&body[12..12 + size]);
            }
            GET_INFLIGHT_FD => {
                let file = tempfile::tempfile_in("/dev/shm").unwrap();
                let mut answer = body.to_vec();
                answer[..8].copy_from_slice(&4096_u64.to_ne_bytes());
                self.send_with(&[request, 1 | REPLY, answer.len() as u32], &answer, &file);
                return None;
            }
            SET_INFLIGHT_FD => {
                use std::os::unix::fs::MetadataExt;
                let file = File::from(files.pop().unwrap());
                script.inflight.push(file.metadata().unwrap().ino());
            }
            _ => {}
        }
        (flags & NEED_REPLY != 0).then(|| 0_u64.to_ne_bytes().to_vec())
    }

    fn send_with(&self, head: &[u32; 3], body: &[u8], file: &File) {
        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
        let files = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let bytes = [head.map(u32::to_ne_bytes).concat(), body.to_vec()].concat();
        let slices = [std::io::IoSlice::new(&bytes)];
        sendmsg(&self.stream, &slices, &mut control, SendFlags::empty()).unwrap();
    }

    /// Where an address is: of the front end's process, or of the guest.
    fn place(&self, address: u64, guest: bool) -> (&File, u64) {
        let start = |region: &Region| if guest { region.guest } else { region.user };
        let mut regions = self.regions.iter();
        let holds =
            |region: &&Region| (start(region)..start(region) + region.size).contains(&address);
        let region = regions.find(holds).expect("an address of the guest's");
        (&region.file, address - start(region))
    }

    fn read<const N: usize>(&self, address: u64) -> [u8; N] {
        let (file, at) = self.place(address, false);
        let mut bytes = [0; N];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    fn write(&self, address: u64, bytes: &[u8], guest: bool) {
        let (file, at) = self.place(address, guest);
        file.write_all_at(bytes, at).unwrap();
    }

    /// Completes each chain: what can be written of it is filled with the number of the ring, and is its length.
    fn serve_ring(&mut self, number: u32) {
        let keeps = self.script.lock().unwrap().keeps;
        let Some(Ring {
            size,
            desc,
            avail,
            used,
            mut next,
            ..
        }) = self.rings.get(&number).map(|ring| Ring {
            kick: None,
            call: None,
            ..*ring
        })
        else {
            return;
        };
        let mut completed = false;
        while u16::from_le_bytes(self.read(avail + 2)) != next {
            let slot = u64::from(next % size);
            let head = u16::from_le_bytes(self.read(avail + 4 + 2 * slot));
            next = next.wrapping_add(1);
            if keeps {
                continue;
            }
            let written = self.fill(desc, head, number as u8);
            let index = u16::from_le_bytes(self.read(used + 2));
            let element = [u32::from(head), written].map(u32::to_le_bytes).concat();
            self.write(used + 4 + 8 * u64::from(index % size), &element, false);
            self.write(used + 2, &index.wrapping_add(1).to_le_bytes(), false);
            completed = true;
        }
        let ring = self.rings.get_mut(&number).unwrap();
        ring.next = next;
        if let Some(call) = ring.call.as_ref().filter(|_| completed) {
            call.signal();
        }
    }

    fn fill(&self, desc: u64, head: u16, value: u8) -> u32 {
        let (mut at, mut written) = (head, 0);
        loop {
            let raw: [u8; 16] = self.read(desc + 16 * u64::from(at));
            let address = u64::from_le_bytes(raw[..8].try_into().unwrap());
            let length = u32::from_le_bytes(raw[8..12].try_into().unwrap());
            let flags = u16::from_le_bytes(raw[12..14].try_into().unwrap());
            if flags & 2 != 0 {
                self.write(address, &vec![value; length as usize], true);
                written += length;
            }
            if flags & 1 == 0 {
                return written;
            }
            at = u16::from_le_bytes(raw[14..].try_into().unwrap());
        }
    }
}

/// A path where nobody listens.
pub(super) fn nobody(folder: &Path) -> PathBuf {
    folder.join("nobody")
}
