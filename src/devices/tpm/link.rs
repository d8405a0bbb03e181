//! The way to swtpm: its control channel, which is the Unix socket that it listens at, and its data channel, which it is
//! given by the first. swtpm_ioctls(3), and swtpm's include/swtpm/tpm_ioctl.h.
//!
//! What swtpm says is not relied on: every answer has a size and a time, and who breaks either is not asked again. A wait
//! ends as well when there are [`Orders`].

use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use super::command::{self, HEADER, Tag};
use super::crb::BUFFER_SIZE;
use super::error::Broken;
use crate::unix_socket::connect_at_once;

/// A command on the control channel. Numbers are four bytes, the most significant first, as all numbers there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Control {
    GetCapability = 1,
    Init = 2,
    GetTpmEstablished = 4,
    CancelTpmCmd = 9,
    Stop = 14,
    SetDataFd = 16,
    SetBufferSize = 17,
}

impl Control {
    /// Its name in swtpm's description.
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::GetCapability => "CMD_GET_CAPABILITY",
            Self::Init => "CMD_INIT",
            Self::GetTpmEstablished => "CMD_GET_TPMESTABLISHED",
            Self::CancelTpmCmd => "CMD_CANCEL_TPM_CMD",
            Self::Stop => "CMD_STOP",
            Self::SetDataFd => "CMD_SET_DATAFD",
            Self::SetBufferSize => "CMD_SET_BUFFERSIZE",
        }
    }
}

// Capabilities.
const CAN_INIT: u32 = 1 << 0;
const CAN_GET_TPMESTABLISHED: u32 = 1 << 2;
const CAN_CANCEL: u32 = 1 << 5;
const CAN_STOP: u32 = 1 << 10;
const CAN_SET_DATAFD: u32 = 1 << 12;
const CAN_SET_BUFFERSIZE: u32 = 1 << 13;
/// What a TPM is not to be had without.
const NEEDED: u32 =
    CAN_INIT | CAN_GET_TPMESTABLISHED | CAN_STOP | CAN_SET_DATAFD | CAN_SET_BUFFERSIZE;

/// Bytes of a result, with which each answer begins.
const RESULT: usize = 4;
/// How often it is tried again to reach a socket where as many wait as may.
const PAUSE: Duration = Duration::from_millis(20);

/// How long swtpm has for what.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// To take a connection.
    pub(super) connect: Duration,
    /// To answer on the control channel.
    pub(super) control: Duration,
    /// To carry out a command of the guest's. Linux waits 300 s for the longest, which makes a key.
    /// drivers/char/tpm/tpm.h, `TPM2_DURATION_LONG_LONG`
    pub(super) command: Duration,
    /// To end one that was cancelled: swtpm hears of that when it is done with the command.
    pub(super) cancelled: Duration,
    /// To switch the TPM off at the VM's end.
    pub(super) end: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            control: Duration::from_secs(10),
            command: Duration::from_secs(300),
            cancelled: Duration::from_secs(60),
            end: Duration::from_secs(2),
        }
    }
}

/// What a wait for swtpm is to end for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// Nothing.
    GoOn,
    /// The command that is being carried out is not wanted any more.
    Cancel,
    /// The VM ends.
    End,
}

/// Who gives orders.
pub(super) trait Orders {
    /// What is readable when there may be a new order.
    fn wake(&self) -> BorrowedFd<'_>;

    /// The order that holds now.
    fn look(&self) -> Order;
}

/// swtpm, connected.
#[derive(Debug)]
pub(super) struct Link {
    control: UnixStream,
    data: UnixStream,
    capabilities: u32,
    limits: Limits,
}

/// A deadline, so far away that it does not matter where time has no such end.
fn after(limit: Duration) -> Instant {
    let now = Instant::now();
    now.checked_add(limit).unwrap_or(now)
}

impl Link {
    /// Connects to the socket at `path`, and has swtpm take the data channel.
    ///
    /// # Errors
    /// [`Broken`]
    pub(super) fn connect(
        path: &Path,
        limits: Limits,
        orders: &dyn Orders,
    ) -> Result<Self, Broken> {
        let control = reach(path, after(limits.connect), orders)?;
        let (data, theirs) = UnixStream::pair().map_err(Broken::System)?;
        data.set_nonblocking(true).map_err(Broken::System)?;
        let mut link = Self {
            control,
            data,
            capabilities: 0,
            limits,
        };
        let [_, _, _, _, rest @ ..] =
            link.control::<8>(Control::GetCapability, &[], None, orders)?;
        link.capabilities = u32::from_be_bytes(rest);
        let missing = NEEDED & !link.capabilities;
        if missing != 0 {
            return Err(Broken::Capabilities { missing });
        }
        let _done =
            link.control::<RESULT>(Control::SetDataFd, &[], Some(theirs.as_fd()), orders)?;
        Ok(link)
    }

    /// Switches the TPM off and on again, as a platform's reset does: PCRs are as at power-on. Says whether hardware has
    /// measured something.
    ///
    /// # Errors
    /// [`Broken`]
    pub(super) fn initialise(&mut self, orders: &dyn Orders) -> Result<bool, Broken> {
        // A buffer's size is set while the TPM stands still.
        let _done = self.control::<RESULT>(Control::Stop, &[], None, orders)?;
        let size = (BUFFER_SIZE as u32).to_be_bytes();
        let [_, _, _, _, a, b, c, d, ..] =
            self.control::<16>(Control::SetBufferSize, &size, None, orders)?;
        let size = u32::from_be_bytes([a, b, c, d]);
        if usize::try_from(size).is_ok_and(|size| size > BUFFER_SIZE) {
            return Err(Broken::BufferSize { size });
        }
        // No flags: what is volatile and was stored for a migration is not deleted.
        let _done = self.control::<RESULT>(Control::Init, &[0; 4], None, orders)?;
        let [_, _, _, _, bit, ..] =
            self.control::<8>(Control::GetTpmEstablished, &[], None, orders)?;
        Ok(bit != 0)
    }

    /// Switches the TPM off.
    ///
    /// # Errors
    /// [`Broken`]
    pub(super) fn stop(&mut self, orders: &dyn Orders) -> Result<(), Broken> {
        self.limits.control = self.limits.end;
        self.control::<RESULT>(Control::Stop, &[], None, orders)
            .map(|_| ())
    }

    /// Has a command of the guest's carried out, and gives the response. Where it is cancelled, the response is waited for
    /// all the same: there is one, and it must not be taken for the next command's.
    ///
    /// # Errors
    /// [`Broken`]
    pub(super) fn execute(
        &mut self,
        command: &[u8],
        orders: &dyn Orders,
    ) -> Result<Vec<u8>, Broken> {
        self.nothing_unasked()?;
        let mut deadline = after(self.limits.command);
        send(&self.data, command, None, deadline, orders)
            .map_err(|broken| broken.of("a command"))?;
        let (mut response, mut cancelled) = (Vec::new(), false);
        // Bytes that are still to come on the control channel.
        let mut owed = 0;
        loop {
            let whole = match response.len() < HEADER {
                true => HEADER,
                false => command::size(&response).ok_or_else(|| Broken::no_response(&response))?,
            };
            if response.len() == HEADER && command::tag(&response) == Tag::Other {
                return Err(Broken::no_response(&response));
            }
            let left = whole - response.len();
            if left == 0 && owed == 0 {
                return Ok(response);
            }
            let order = orders.look();
            if !cancelled && order == Order::Cancel && left > 0 {
                cancelled = true;
                deadline = deadline.min(after(self.limits.cancelled));
                if self.capabilities & CAN_CANCEL != 0 {
                    let message = (Control::CancelTpmCmd as u32).to_be_bytes();
                    send(&self.control, &message, None, deadline, orders)?;
                    owed = RESULT;
                }
            }
            let what = || match left {
                0 => Control::CancelTpmCmd.name(),
                _ => "a command",
            };
            let wait = Wait {
                events: PollFlags::IN,
                deadline,
                known: Some(order),
            };
            let ready = wait
                .until([&self.data, &self.control], orders)
                .map_err(|broken| broken.of(what()))?;
            if ready[0] {
                let mut piece = [0; BUFFER_SIZE];
                let room = piece.get_mut(..left.max(1)).unwrap_or_default();
                let got = receive(&self.data, room)?;
                // What comes behind a response was not asked for.
                if left == 0 && !got.is_empty() {
                    return Err(Broken::Unasked);
                }
                response.extend_from_slice(got);
            }
            if ready[1] {
                let mut piece = [0; RESULT];
                let room = piece.get_mut(..owed.clamp(1, RESULT)).unwrap_or_default();
                let got = receive(&self.control, room)?.len();
                // Whether it could be cancelled says nothing: the response does.
                owed = owed.checked_sub(got).ok_or(Broken::Unasked)?;
            }
        }
    }

    /// What to wait for beside a wake-up while nothing is asked of swtpm: whatever comes then ends the link.
    pub(super) fn channels(&self) -> [BorrowedFd<'_>; 2] {
        [self.control.as_fd(), self.data.as_fd()]
    }

    /// Whether swtpm has said nothing that it was not asked for, and is still there.
    ///
    /// # Errors
    /// [`Broken::Unasked`], [`Broken::Closed`]
    pub(super) fn nothing_unasked(&self) -> Result<(), Broken> {
        for mut stream in [&self.control, &self.data] {
            match stream.read(&mut [0]) {
                Ok(0) => return Err(Broken::Closed),
                Ok(_) => return Err(Broken::Unasked),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(Broken::of_stream(error)),
            }
        }
        Ok(())
    }

    /// Asks on the control channel, and gives the answer of `N` bytes where its result is that it was done.
    fn control<const N: usize>(
        &self,
        command: Control,
        body: &[u8],
        file: Option<BorrowedFd<'_>>,
        orders: &dyn Orders,
    ) -> Result<[u8; N], Broken> {
        self.nothing_unasked()?;
        let deadline = after(self.limits.control);
        let message = [&(command as u32).to_be_bytes(), body].concat();
        let answered = || {
            send(&self.control, &message, file, deadline, orders)?;
            let (mut answer, mut filled) = ([0; N], 0);
            while filled < N {
                // A refusal is a result alone.
                let end = if filled < RESULT { RESULT } else { N };
                let room = answer.get_mut(filled..end).unwrap_or_default();
                Wait::input(deadline).until([&self.control], orders)?;
                filled += receive(&self.control, room)?.len();
                if filled == RESULT
                    && let Some(code) = refusal(&answer)
                {
                    return Err(Broken::Refused { command, code });
                }
            }
            Ok(answer)
        };
        answered().map_err(|broken| broken.of(command.name()))
    }
}

/// The result that an answer begins with, where it is not that it was done.
fn refusal(answer: &[u8]) -> Option<u32> {
    let result = answer.get(..RESULT)?.try_into().ok()?;
    Some(u32::from_be_bytes(result)).filter(|code| *code != 0)
}

/// Connects, without ever waiting for longer than there is time, or than the VM lives.
fn reach(path: &Path, deadline: Instant, orders: &dyn Orders) -> Result<UnixStream, Broken> {
    loop {
        match connect_at_once(path) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(source) => {
                return Err(Broken::Unreachable {
                    path: PathBuf::from(path),
                    source,
                });
            }
            Ok(stream) => return Ok(stream),
        }
        if Instant::now() >= deadline {
            return Err(Broken::Late {
                what: "a connection",
            });
        }
        match Wait::input(deadline.min(after(PAUSE))).until([], orders) {
            Ok([]) | Err(Broken::Late { .. }) => {}
            Err(broken) => return Err(broken),
        }
    }
}

/// A wait for swtpm.
struct Wait {
    events: PollFlags,
    deadline: Instant,
    /// The order that holds, whose change ends the wait; nothing, where only the VM's end does.
    known: Option<Order>,
}

impl Wait {
    fn input(deadline: Instant) -> Self {
        Self {
            events: PollFlags::IN,
            deadline,
            known: None,
        }
    }

    /// Waits until one of the streams is ready, and says which are: none, where there may be another order.
    fn until<const N: usize>(
        self,
        streams: [&UnixStream; N],
        orders: &dyn Orders,
    ) -> Result<[bool; N], Broken> {
        let order = orders.look();
        if order == Order::End {
            return Err(Broken::Ended);
        }
        let mut is_ready = [false; N];
        if self.known.is_some_and(|known| known != order) {
            return Ok(is_ready);
        }
        let late = Broken::Late { what: "" };
        let Some(left) = self.deadline.checked_duration_since(Instant::now()) else {
            return Err(late);
        };
        let wake = orders.wake();
        let mut fds = vec![PollFd::new(&wake, PollFlags::IN)];
        fds.extend(
            streams
                .iter()
                .map(|stream| PollFd::new(*stream, self.events)),
        );
        match poll(&mut fds, Timespec::try_from(left).ok().as_ref()) {
            Ok(0) => return Err(late),
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(is_ready),
            Err(error) => return Err(Broken::System(error.into())),
        }
        for (is_ready, fd) in is_ready.iter_mut().zip(fds.iter().skip(1)) {
            *is_ready = !fd.revents().is_empty();
        }
        Ok(is_ready)
    }
}

/// Sends all of `bytes`, a descriptor with the first of them.
fn send(
    stream: &UnixStream,
    bytes: &[u8],
    file: Option<BorrowedFd<'_>>,
    deadline: Instant,
    orders: &dyn Orders,
) -> Result<(), Broken> {
    let (mut rest, mut file) = (bytes, file);
    while !rest.is_empty() {
        match send_some(stream, rest, file) {
            Ok(count) => {
                rest = rest.get(count..).unwrap_or_default();
                file = None;
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                let wait = Wait {
                    events: PollFlags::OUT,
                    ..Wait::input(deadline)
                };
                wait.until([stream], orders)?;
            }
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Broken::of_stream(error)),
        }
    }
    Ok(())
}

fn send_some(
    mut stream: &UnixStream,
    bytes: &[u8],
    file: Option<BorrowedFd<'_>>,
) -> io::Result<usize> {
    let Some(file) = file else {
        return stream.write(bytes);
    };
    let files = [file];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&files));
    let bytes = [IoSlice::new(bytes)];
    Ok(sendmsg(stream, &bytes, &mut control, SendFlags::NOSIGNAL)?)
}

/// What has come, as far as there is `room`: nothing, where it was somebody else's signal.
fn receive<'a>(mut stream: &UnixStream, room: &'a mut [u8]) -> Result<&'a [u8], Broken> {
    match stream.read(room) {
        Ok(0) if !room.is_empty() => Err(Broken::Closed),
        Ok(count) => Ok(room.get(..count).unwrap_or_default()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            Ok(&[])
        }
        Err(error) => Err(Broken::of_stream(error)),
    }
}
