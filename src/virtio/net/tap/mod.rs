//! A tap interface of the host, with one descriptor for each pair of queues.

mod error;
mod interface;

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use busway_iommu::{Command, printable};

use super::features;
use crate::shortage;
use crate::virtio::spec::net;
pub use error::TapError;
use interface::{Interface, NAME_SIZE, request};

/// The pattern of names from which the kernel takes the first free one.
const ANY_NAME: &str = "vmtap%d";

/// A tap interface. It goes away with its last descriptor, unless it was made to persist.
#[derive(Debug)]
pub(super) struct Tap {
    name: String,
    queues: Vec<Arc<File>>,
    multi_queue: bool,
    /// It takes and hands over UDP that is to be cut into segments (`TUN_F_USO4` and `TUN_F_USO6`, Linux 6.2).
    uso: bool,
    /// What it may hand over unfinished at this moment: feature bits, `VIRTIO_NET_F_GUEST_*`.
    offloads: AtomicU64,
    /// It is no interface, and its queues are sockets, which know nothing of offloads.
    #[cfg(any(test, feature = "hostile"))]
    made_up: bool,
}

impl Tap {
    /// Opens interface `name`, or one that the kernel names, with `pairs` pairs of queues, and brings
    /// it up. It is made where it does not exist.
    pub(super) fn open(name: Option<&str>, pairs: u16) -> Result<Self, TapError> {
        let asked = name.unwrap_or(ANY_NAME);
        check_name(asked, name.is_some())?;
        let mut tap = Self {
            multi_queue: pairs > 1,
            ..Self::named(asked)
        };
        for _ in 0..pairs.max(1) {
            let queue = open_tun()?;
            if let Err(error) = tap.attach(&queue) {
                return Err(tap.attach_error(error, pairs));
            }
            tap.add_queue(queue)?;
        }
        tap.probe();
        tap.bring_up()?;
        Ok(tap)
    }

    fn named(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            queues: Vec::new(),
            multi_queue: false,
            uso: false,
            offloads: AtomicU64::new(0),
            #[cfg(any(test, feature = "hostile"))]
            made_up: false,
        }
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
            multi_queue: pairs > 1,
            ..Self::named("")
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
        tap.probe();
        Ok(tap)
    }

    /// No interface: each of these sockets carries the packets of a pair of queues.
    #[cfg(any(test, feature = "hostile"))]
    pub(super) fn made_up(queues: Vec<OwnedFd>) -> Self {
        Self {
            multi_queue: queues.len() > 1,
            queues: queues.into_iter().map(|fd| Arc::new(fd.into())).collect(),
            uso: true,
            made_up: true,
            ..Self::named("made-up")
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

    /// Finds out what the kernel's taps can do, and has this one hand over nothing unfinished until a driver asks.
    fn probe(&mut self) {
        let uso = libc::TUN_F_CSUM | libc::TUN_F_USO4 | libc::TUN_F_USO6;
        self.uso = self.set_offload(uso).is_ok();
        if let Err(error) = self.set_offload(0) {
            log::debug!("tap {}: TUNSETOFFLOAD: {error}", self.name);
        }
    }

    /// Whether it takes and hands over UDP that is to be cut into segments.
    pub(super) fn has_uso(&self) -> bool {
        self.uso
    }

    /// What it may hand over unfinished at this moment: feature bits, `VIRTIO_NET_F_GUEST_*`. While that is changed, what
    /// it may before or after.
    pub(super) fn offloads(&self) -> u64 {
        self.offloads.load(Ordering::Relaxed)
    }

    /// Has it hand over unfinished what `offloads` say, feature bits: `VIRTIO_NET_F_GUEST_*`.
    ///
    /// # Errors
    /// The kernel's; it stays as it was.
    pub(super) fn set_offloads(&self, offloads: u64) -> io::Result<()> {
        let before = self.offloads.fetch_or(offloads, Ordering::Relaxed);
        let set = self.set_offload(features::offload(offloads));
        let now = if set.is_ok() { offloads } else { before };
        self.offloads.store(now, Ordering::Relaxed);
        set
    }

    /// What the kernel may hand over unfinished: `TUN_F_*`, linux/if_tun.h.
    fn set_offload(&self, flags: libc::c_uint) -> io::Result<()> {
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
        let failed = |what| move |source| self.kernel(what, source);
        let interface = Interface::new(&self.name).map_err(failed("socket"))?;
        let flags = interface.flags().map_err(failed("SIOCGIFFLAGS"))?;
        let up = libc::IFF_UP as libc::c_short;
        if flags & up != 0 {
            return Ok(());
        }
        match interface.set_flags(flags | up) {
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
            result => result.map_err(failed("SIOCSIFFLAGS")),
        }
    }

    /// Has the interface carry packets of `mtu` bytes. Nothing is asked of the kernel that needs a right where it does so
    /// already.
    ///
    /// # Errors
    /// [`TapError`]: this user may not change it, or the tap takes no such MTU.
    pub(super) fn set_mtu(&self, mtu: u16) -> Result<(), TapError> {
        let failed = |what| move |source| self.kernel(what, source);
        let interface = Interface::new(&self.name).map_err(failed("socket"))?;
        let now = interface.mtu().map_err(failed("SIOCGIFMTU"))?;
        if now == u32::from(mtu) {
            return Ok(());
        }
        let name = self.name.clone();
        interface
            .set_mtu(mtu)
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EPERM | libc::EACCES) => TapError::MtuNotPermitted { name, now, mtu },
                _ => TapError::Mtu { name, mtu, source },
            })
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

/// Nodes that were opened in the host's network namespace, by a process that has left it.
static KEPT: OnceLock<Mutex<Vec<File>>> = OnceLock::new();

/// Opens what `pairs` pairs of queues need of the host's network namespace, which the process is about to leave. From then
/// on there is no more of it. The tap that a node is given belongs to the namespace in which the node was opened: Linux,
/// drivers/net/tun.c, `tun_chr_open`.
///
/// # Errors
/// [`TapError::NoTun`], [`TapError::Socket`]
pub(crate) fn keep_host_network(pairs: usize) -> Result<(), TapError> {
    let nodes = (0..pairs).map(|_| open_node());
    let nodes = nodes.collect::<Result<Vec<_>, _>>()?;
    if pairs > 0 {
        interface::keep_socket().map_err(TapError::Socket)?;
    }
    let _already = KEPT.set(Mutex::new(nodes));
    Ok(())
}

fn open_tun() -> Result<File, TapError> {
    let Some(kept) = KEPT.get() else {
        return open_node();
    };
    let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
    kept.pop().ok_or(TapError::Jailed)
}

fn open_node() -> Result<File, TapError> {
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
                _ => shortage::remedy_of_descriptors(&source, "")
                    .unwrap_or("it has to be the tun driver's node: character device 10:200"),
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
