//! A tap interface of the host, with one descriptor for each pair of queues.

use std::ffi::{CStr, c_char};
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use busway_iommu::{Command, printable};

use crate::virtio::spec::net;

/// The pattern of names from which the kernel takes the first free one.
const ANY_NAME: &str = "vmtap%d";

/// The bytes of `ifr_name`, with its final zero.
const NAME_SIZE: usize = libc::IFNAMSIZ;

/// A tap interface cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// cannot open /dev/net/tun: {source}; {remedy}
    #[error("cannot open /dev/net/tun: {source}; {remedy}")]
    NoTun {
        /// Why.
        source: io::Error,
        /// What to do.
        remedy: &'static str,
    },
    /// `{name}` is no name for an interface: it has 1 to 15 characters, none of them a slash, a colon or a space
    #[error(
        "`{name}` is no name for an interface: it has 1 to 15 characters, none of them a slash, a colon or a space"
    )]
    Name {
        /// The name.
        name: String,
    },
    /// tap {name}: not permitted; make it beforehand for this user, with `ip tuntap add dev {example} mode tap user $USER`, or give Busway CAP_NET_ADMIN
    #[error(
        "tap {name}: not permitted; make it beforehand for this user, with `{} user $USER{multi_queue}`, or give Busway CAP_NET_ADMIN",
        add(example)
    )]
    NotPermitted {
        /// The name asked for.
        name: String,
        /// A name for the example.
        example: String,
        /// ` multi_queue` where that is needed.
        multi_queue: &'static str,
    },
    /// tap {name} is in use by another program: stop it, or give another name
    #[error("tap {name} is in use by another program: stop it, or give another name")]
    Busy {
        /// The name.
        name: String,
    },
    /// {name} exists and is not a tap that takes {queues} queues: remove it with `ip link delete dev {name}`, make it with `ip tuntap add dev {name} mode tap multi_queue`, or give another name
    #[error(
        "{name} exists and is not a tap that takes {queues} queues: remove it with `{}`, make it with `{} multi_queue`, or give another name",
        Command::new(["ip", "link", "delete", "dev"]).operand(name),
        add(name)
    )]
    Mismatch {
        /// The name.
        name: String,
        /// How many were asked for.
        queues: u16,
    },
    /// fd={number} is no descriptor that was inherited
    #[error(
        "fd={number} is no descriptor that Busway has inherited: whoever starts Busway opens the tap without \
         close-on-exec, and says its number, 3 or more"
    )]
    NotInherited {
        /// The number.
        number: u32,
    },
    /// the descriptor that was passed, which is {what}, is no tap's
    #[error(
        "the descriptor that was passed, which is {what}, is no tap's: TUNGETIFF: {source}; pass those of a \
         tap, one for each pair of queues"
    )]
    NoTap {
        /// What it is.
        what: String,
        /// Why.
        source: io::Error,
    },
    /// {files} descriptors were passed, and num_queues={queues} needs {pairs}
    #[error(
        "{files} descriptors were passed, and num_queues={queues} needs {pairs}: one for each pair of queues"
    )]
    Count {
        /// How many were.
        files: usize,
        /// How many queues were asked for.
        queues: u16,
        /// How many pairs these are.
        pairs: u16,
    },
    /// {name} was opened in another way than a tap with IFF_NO_PI and IFF_VNET_HDR
    #[error(
        "{name} was opened in another way than a NIC needs it: open it with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR\
         {multi_queue}"
    )]
    Kind {
        /// The interface.
        name: String,
        /// `, and with IFF_MULTI_QUEUE ...` where that is needed.
        multi_queue: &'static str,
    },
    /// the descriptors are of two taps, {first} and {name}
    #[error("the descriptors are of two taps, {first} and {name}: hand over those of one")]
    Several {
        /// The first's.
        first: String,
        /// Another's.
        name: String,
    },
    /// tap {name}: {what} failed: {source}
    #[error("tap {name}: {what} failed: {source}")]
    Kernel {
        /// The name.
        name: String,
        /// The ioctl.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// A tap interface. It goes away with its last descriptor, unless it was made to persist.
#[derive(Debug)]
pub(super) struct Tap {
    name: String,
    queues: Vec<Arc<File>>,
    multi_queue: bool,
    /// It is no interface, and its queues are sockets, which know nothing of offloads.
    #[cfg(any(test, feature = "hostile"))]
    made_up: bool,
}

/// The command that makes a tap.
fn add(name: &str) -> Command {
    Command::new(["ip", "tuntap", "add", "dev"])
        .operand(name)
        .operand("mode")
        .operand("tap")
}

impl Tap {
    /// Opens interface `name`, or one that the kernel names, with `pairs` pairs of queues, and brings
    /// it up. It is made where it does not exist.
    pub(super) fn open(name: Option<&str>, pairs: u16) -> Result<Self, TapError> {
        let asked = name.unwrap_or(ANY_NAME);
        check_name(asked, name.is_some())?;
        let mut tap = Self {
            name: asked.to_owned(),
            queues: Vec::new(),
            multi_queue: pairs > 1,
            #[cfg(any(test, feature = "hostile"))]
            made_up: false,
        };
        for _ in 0..pairs.max(1) {
            let queue = open_tun()?;
            if let Err(error) = tap.attach(&queue) {
                return Err(tap.attach_error(error, pairs));
            }
            tap.add_queue(queue)?;
        }
        tap.bring_up()?;
        Ok(tap)
    }

    /// The interface whose queues somebody else has opened, one for each of `pairs` pairs of queues. It is
    /// left up or down, as it is.
    pub(super) fn adopt(files: &[OwnedFd], pairs: u16) -> Result<Self, TapError> {
        if files.len() != usize::from(pairs) {
            return Err(TapError::Count {
                files: files.len(),
                queues: pairs.saturating_mul(2),
                pairs,
            });
        }
        let mut tap = Self {
            name: String::new(),
            queues: Vec::new(),
            multi_queue: pairs > 1,
            #[cfg(any(test, feature = "hostile"))]
            made_up: false,
        };
        for file in files {
            let no_tap = |source| TapError::NoTap {
                what: described(file),
                source,
            };
            let queue: File = file.try_clone().map_err(no_tap)?.into();
            let mut request = request("", 0);
            // SAFETY: TUNGETIFF writes an ifreq, which `request` is.
            let result =
                unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNGETIFF as _, &raw mut request) };
            check(result).map_err(no_tap)?;
            // SAFETY: TUNGETIFF has filled in the flags.
            let flags = libc::c_int::from(unsafe { request.ifr_ifru.ifru_flags });
            let name = name_of(&request);
            let (more, multi_queue) = match tap.multi_queue {
                true => (
                    libc::IFF_MULTI_QUEUE,
                    ", and for several queues IFF_MULTI_QUEUE",
                ),
                false => (0, ""),
            };
            let wanted = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
            if flags & wanted != wanted {
                return Err(TapError::Kind { name, multi_queue });
            }
            if !tap.queues.is_empty() && tap.name != name {
                let first = tap.name;
                return Err(TapError::Several { first, name });
            }
            tap.name = name;
            // Flags are the open file's, which whoever passed it shares.
            rustix::io::ioctl_fionbio(&queue, true)
                .map_err(|error| tap.kernel("FIONBIO", error.into()))?;
            tap.add_queue(queue)?;
        }
        Ok(tap)
    }

    /// No interface: each of these sockets carries the packets of a pair of queues.
    #[cfg(any(test, feature = "hostile"))]
    pub(super) fn made_up(queues: Vec<OwnedFd>) -> Self {
        Self {
            name: "made-up".to_owned(),
            multi_queue: queues.len() > 1,
            queues: queues.into_iter().map(|fd| Arc::new(fd.into())).collect(),
            made_up: true,
        }
    }

    /// Has a queue of the interface's carry the header that virtio has.
    fn add_queue(&mut self, queue: File) -> Result<(), TapError> {
        let size = net::HEADER_SIZE as libc::c_int;
        // SAFETY: TUNSETVNETHDRSZ reads an int, which `size` is.
        let result =
            unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETVNETHDRSZ, &raw const size) };
        self.check("TUNSETVNETHDRSZ", result)?;
        self.queues.push(Arc::new(queue));
        Ok(())
    }

    /// The interface's name.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// A queue pair's descriptor.
    pub(super) fn queue(&self, pair: usize) -> Option<&Arc<File>> {
        self.queues.get(pair)
    }

    /// What the kernel may hand over unfinished: `TUN_F_*`, linux/if_tun.h.
    pub(super) fn set_offload(&self, flags: libc::c_uint) -> io::Result<()> {
        #[cfg(any(test, feature = "hostile"))]
        if self.made_up {
            return Ok(());
        }
        let Some(queue) = self.queues.first() else {
            return Ok(());
        };
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        let result = unsafe {
            libc::ioctl(
                queue.as_raw_fd(),
                libc::TUNSETOFFLOAD,
                libc::c_ulong::from(flags),
            )
        };
        check(result)
    }

    /// Uses the first `pairs` queue pairs and no others, so that no packet goes where nobody reads.
    pub(super) fn use_pairs(&self, pairs: u16) -> io::Result<()> {
        #[cfg(any(test, feature = "hostile"))]
        if self.made_up {
            return Ok(());
        }
        if self.queues.len() < 2 {
            return Ok(());
        }
        for (number, queue) in (0..).zip(&self.queues) {
            let (flag, already) = if number < pairs {
                (libc::IFF_ATTACH_QUEUE, "attached")
            } else {
                (libc::IFF_DETACH_QUEUE, "detached")
            };
            let request = request("", flag);
            // SAFETY: TUNSETQUEUE reads an ifreq, which `request` is.
            let result =
                unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETQUEUE, &raw const request) };
            match check(result) {
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    log::trace!("queue pair {number} of {} is {already} already", self.name);
                }
                result => result?,
            }
        }
        Ok(())
    }

    /// Drops what waits in the queues: it came before the driver was ready, and may be unfinished in
    /// ways that this driver does not take.
    pub(super) fn discard_waiting(&self) {
        let mut start = [0; 64];
        for queue in &self.queues {
            // As many as the kernel keeps at most, by its default; what comes meanwhile is welcome.
            for _ in 0..libc::TUN_READQ_SIZE * 2 {
                if (&**queue).read(&mut start).is_err() {
                    break;
                }
            }
        }
    }

    /// Makes `queue` one of the interface's, and learns its name.
    fn attach(&mut self, queue: &File) -> io::Result<()> {
        let base = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        let multi_queue = base | libc::IFF_MULTI_QUEUE;
        let attempt = |name: &str, flags| {
            let mut request = request(name, flags);
            // SAFETY: TUNSETIFF reads and writes an ifreq, which `request` is.
            let result =
                unsafe { libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
            check(result).map(|()| name_of(&request))
        };
        let name = if self.multi_queue {
            attempt(&self.name, multi_queue)?
        } else {
            match attempt(&self.name, base) {
                // One that was made for several queues takes a single one too.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                    attempt(&self.name, multi_queue).map_err(|_| error)?
                }
                result => result?,
            }
        };
        self.name = name;
        Ok(())
    }

    fn attach_error(&self, source: io::Error, pairs: u16) -> TapError {
        let name = self.name.clone();
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => TapError::NotPermitted {
                example: name.replace("%d", "0"),
                name,
                multi_queue: if pairs > 1 { " multi_queue" } else { "" },
            },
            Some(libc::EBUSY) => TapError::Busy { name },
            Some(libc::EINVAL) => TapError::Mismatch {
                name,
                queues: pairs.saturating_mul(2),
            },
            _ => TapError::Kernel {
                name,
                what: "TUNSETIFF",
                source,
            },
        }
    }

    /// Brings the interface up. Who may use a tap may not always change it; then it stays down, and
    /// that is said.
    fn bring_up(&self) -> Result<(), TapError> {
        // SAFETY: socket takes no pointer; the result is checked.
        let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        self.check("socket", fd)?;
        // SAFETY: the kernel has just made this descriptor, and nobody else knows it.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        let mut request = request(&self.name, 0);
        // SAFETY: SIOCGIFFLAGS reads and writes an ifreq, which `request` is.
        let result =
            unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut request) };
        self.check("SIOCGIFFLAGS", result)?;
        // SAFETY: SIOCGIFFLAGS has filled in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        let up = libc::IFF_UP as libc::c_short;
        if flags & up != 0 {
            return Ok(());
        }
        request.ifr_ifru.ifru_flags = flags | up;
        // SAFETY: SIOCSIFFLAGS reads an ifreq, which `request` is.
        let result =
            unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
        match check(result) {
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                log::warn!(
                    "tap {name} is down and this user may not change that: `{command}`",
                    name = self.name,
                    command = Command::new(["ip", "link", "set", "dev"])
                        .operand(&self.name)
                        .operand("up"),
                );
                Ok(())
            }
            Err(source) => Err(self.kernel("SIOCSIFFLAGS", source)),
            Ok(()) => Ok(()),
        }
    }

    fn check(&self, what: &'static str, result: libc::c_int) -> Result<(), TapError> {
        check(result).map_err(|source| self.kernel(what, source))
    }

    fn kernel(&self, what: &'static str, source: io::Error) -> TapError {
        TapError::Kernel {
            name: self.name.clone(),
            what,
            source,
        }
    }
}

/// Takes over the descriptor that this process inherited by its number. It is closed on exec from then on.
///
/// All that Busway opens is closed on exec, so that what is not was inherited; the configuration names each once.
pub(super) fn inherit(number: u32) -> Result<OwnedFd, TapError> {
    let not = || TapError::NotInherited { number };
    let fd = libc::c_int::try_from(number).map_err(|_| not())?;
    if fd <= libc::STDERR_FILENO {
        return Err(not());
    }
    // SAFETY: F_GETFD gives flags, and touches no memory.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
    if flags < 0 || flags & libc::FD_CLOEXEC != 0 {
        return Err(not());
    }
    // SAFETY: it is open, and was inherited for this: nothing else here uses or closes it.
    let file = unsafe { busway_vfio::adopt(number) };
    Ok(file.map_err(|_| not())?.into())
}

/// What a descriptor leads to, as the kernel names it.
fn described(file: &OwnedFd) -> String {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    match std::fs::read_link(link) {
        Ok(path) => printable(&path.display().to_string()),
        Err(_) => "of an unknown kind".to_owned(),
    }
}

fn open_tun() -> Result<File, TapError> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")
        .map_err(|source| TapError::NoTun {
            remedy: match source.raw_os_error() {
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => {
                    "the host's kernel has no tun driver loaded: `modprobe tun`"
                }
                Some(libc::EACCES | libc::EPERM) => {
                    "this user has to be able to read and write it; mostly everybody can: `chmod 666 /dev/net/tun`"
                }
                _ => "it has to be the tun driver's node: character device 10:200",
            },
            source,
        })
}

fn check_name(name: &str, given: bool) -> Result<(), TapError> {
    let fits = (1..NAME_SIZE).contains(&name.len());
    let odd = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || !c.is_ascii_graphic();
    if !fits || name == "." || name == ".." || given && name.chars().any(odd) {
        return Err(TapError::Name {
            name: name.to_owned(),
        });
    }
    Ok(())
}

fn request(name: &str, flags: libc::c_int) -> libc::ifreq {
    // SAFETY: all zeros is a valid ifreq, which is plain data.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let room = request.ifr_name.iter_mut().take(NAME_SIZE - 1);
    for (to, from) in room.zip(name.bytes()) {
        *to = from as c_char;
    }
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    request
}

fn name_of(request: &libc::ifreq) -> String {
    let bytes: Vec<u8> = request.ifr_name.iter().map(|&c| c as u8).collect();
    CStr::from_bytes_until_nul(&bytes)
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_refuse_are_refused_with_the_rule() {
        for name in ["", "a/b", "sixteen_letters_", "a b", "tap%d", ".."] {
            let error = Tap::open(Some(name), 1).unwrap_err();
            assert!(matches!(error, TapError::Name { .. }), "{name}: {error}");
        }
    }

    #[test]
    fn an_interface_that_is_no_tap_is_refused() {
        if open_tun().is_err() {
            eprintln!("skipped: no /dev/net/tun here");
            return;
        }
        match Tap::open(Some("lo"), 1) {
            Err(TapError::Mismatch { .. } | TapError::NotPermitted { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}
