//! Why a VM did not start or did not end well, and the exit status that says so.

use std::io;
use std::time::Duration;

use busway_host::files::is_no_room;
use busway_iommu::{MemlockError, OpenError};
use busway_pci::{AssignError, BarIndex, PlaceError, WindowKind};
use busway_vfio::{DeviceError, InheritedError};

use super::address_plan::NoRoomError;
use super::passthrough::dma::PeerToPeerError;
use super::passthrough::open_devices::OpenDevices;
use super::placing::PlacingError;
use super::pluggable::PluggableError;
use crate::acpi::AcpiError;
use crate::arch::board::BoardError;
use crate::arch::boot::BootError;
use crate::config::InvalidConfig;
use crate::devices::console::ConsoleError;
use crate::devices::tpm::TpmError;
use crate::exit::{HOST, RUNTIME, USAGE};
use crate::firmware::FirmwareError;
use crate::kvm::{KvmError, Overlap};
use crate::memory::{Amount, PlugError, PrefaultError, RamError, RegionsError};
use crate::sandbox::landlock::LandlockError;
use crate::virtio::VirtioPciError;
use crate::virtio::balloon::TargetError;
use crate::virtio::blk::BlkError;
use crate::virtio::mem::MemTargetError;
use crate::virtio::net::{NetError, TapError};
use crate::virtio::pmem::{PmemError, PmemFault};
use crate::virtio::rng::RngError;
use crate::virtio::vhost_user::{BackEndError, VhostUserError};
use crate::virtio::vsock::VsockError;

/// Why a VM could not run, or had to end.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The configuration contradicts itself.
    #[error(transparent)]
    Config(#[from] InvalidConfig),
    /// Landlock cannot bound the process.
    #[error(transparent)]
    Landlock(#[from] LandlockError),
    /// The host cannot keep other processes from the cores of vCPUs.
    #[error(
        "--cpus core_scheduling={word}: this kernel cannot keep others from the vCPUs' cores ({source}): it needs Linux \
         5.14 with CONFIG_SCHED_CORE; core_scheduling=off goes without"
    )]
    CoreScheduling {
        /// What was asked for.
        word: &'static str,
        /// Why.
        source: io::Error,
    },
    /// There is nothing that could be booted.
    #[error(transparent)]
    Boot(#[from] BootError),
    /// There is no firmware, or none that can be used.
    #[error(transparent)]
    Firmware(#[from] FirmwareError),
    /// KVM cannot do it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// RAM that the guest is to have from its start on, beside what it starts with, cannot be had.
    #[error(transparent)]
    Plug(#[from] PlugError),
    /// There is no such RAM.
    #[error(transparent)]
    Ram(#[from] RamError),
    /// RAM could not be populated.
    #[error(transparent)]
    Prefault(#[from] PrefaultError),
    /// Memory could not be made reachable.
    #[error(transparent)]
    Regions(#[from] RegionsError),
    /// A disk cannot be had.
    #[error(transparent)]
    Disk(#[from] BlkError),
    /// The file that was to be a device's ROM cannot be.
    #[error(transparent)]
    Rom(#[from] busway_vfio::RomError),
    /// A NIC cannot be had.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A device that another process serves cannot be had.
    #[error(transparent)]
    VhostUser(#[from] VhostUserError),
    /// Persistent memory cannot be had.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// A vsock device cannot be had.
    #[error(transparent)]
    Vsock(#[from] VsockError),
    /// The entropy source cannot be had.
    #[error(transparent)]
    Rng(#[from] RngError),
    /// The TPM cannot be had.
    #[error(transparent)]
    Tpm(#[from] TpmError),
    /// The balloon cannot be so large.
    #[error("--balloon: {0}")]
    Balloon(#[from] TargetError),
    /// The memory device cannot have so much plugged.
    #[error("--memory: {0}")]
    Mem(#[from] MemTargetError),
    /// RAM that is to come finds no place, or is out of devices' reach.
    #[error(transparent)]
    Pluggable(#[from] PluggableError),
    /// It cannot be where its devices are.
    #[error(transparent)]
    Placing(#[from] PlacingError),
    /// {flag}: {source}
    #[error("{flag}: {source}")]
    Console {
        /// `--serial` or `--console`.
        flag: &'static str,
        /// Why.
        source: ConsoleError,
    },
    /// A virtio device cannot be a PCI function.
    #[error(transparent)]
    Virtio(#[from] VirtioPciError),
    /// The host's IOMMU cannot be used.
    #[error(transparent)]
    DmaSpace(#[from] OpenError),
    /// guest RAM cannot be pinned for the assigned devices: {0}
    #[error("guest RAM cannot be pinned for the assigned devices: {0}")]
    Memlock(#[from] MemlockError),
    /// Not every BAR is in reach of the other devices, as --platform p2p=on demands.
    #[error(transparent)]
    PeerToPeer(#[from] PeerToPeerError),
    /// A descriptor that was inherited is of no use.
    #[error(transparent)]
    Inherited(#[from] InheritedError),
    /// A host device cannot be had.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// {error}; `busway device check` finds besides: {obstacles}
    #[error("{error}; `busway device check` finds besides: {obstacles}")]
    NotReady {
        /// What the kernel refused.
        error: Box<RunError>,
        /// What stands against it, with what helps.
        obstacles: String,
    },
    /// A host device cannot be shown to a guest.
    #[error(transparent)]
    Function(#[from] busway_vfio::SurveyError),
    /// {device} finds no slot: bus 0 has 31, and each virtio device and each assigned device takes one
    #[error(
        "{device} finds no slot: bus 0 has 31, and each virtio device and each assigned device \
         takes one; give the VM fewer devices"
    )]
    NoSlot {
        /// The device that was one too many.
        device: String,
    },
    /// {device}: pci_device_id={slot} is for a root port
    #[error(
        "{device}: pci_device_id={slot}: 16 to 31 are for root ports, and a device on bus 0 itself has 1 to 15: take one of \
         these, or leave pci_device_id out"
    )]
    PortSlot {
        /// The device that is to be there.
        device: String,
        /// The slot.
        slot: u8,
    },
    /// {device}: {slot} is another's already
    #[error(
        "{device}: {slot} is another device's already: take another pci_device_id, or leave it out"
    )]
    SlotTaken {
        /// The device that is to be there.
        device: String,
        /// The slot.
        slot: String,
    },
    /// {device}: there is no PCI segment {segment}
    #[error(
        "{device}: the VM has no PCI segment {segment}: start it with more (--platform num_pci_segments=N), or leave \
         pci_segment out"
    )]
    NoSegment {
        /// The device that is to be there.
        device: String,
        /// The segment.
        segment: u32,
    },
    /// Functions of one host device are to be in different places.
    #[error(
        "{0} are functions of one host device, which is one device of the guest's: say the same pci_segment and \
         pci_device_id for all of them"
    )]
    SplitDevice(String),
    /// The configuration spaces of the PCI segments find no room below 4 GiB.
    #[error(
        "the configuration spaces of {segments} PCI segments need more than the {room} MiB that there are for all but the \
         first: have fewer segments (--platform num_pci_segments=), or fewer devices and empty slots in them"
    )]
    NoEcamRoom {
        /// How many there are to be.
        segments: usize,
        /// MiB.
        room: u64,
    },
    /// A function cannot be put where it should be.
    #[error(transparent)]
    Place(#[from] PlaceError),
    /// The host devices' BARs do not fit, as far as sysfs tells of them.
    #[error(transparent)]
    NoRoom(#[from] NoRoomError),
    /// The functions' BARs do not fit.
    #[error(transparent)]
    Addresses(#[from] AssignError),
    /// Two platform devices claim an address.
    #[error(transparent)]
    Overlap(#[from] Overlap),
    /// The ACPI tables cannot be made.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// {0}
    #[error(transparent)]
    Board(#[from] BoardError),
    /// {what}: {source}
    #[error("{what}: {source}")]
    System {
        /// What was done.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// the guest triple-faulted
    #[error(
        "the guest triple-faulted on vCPU {vcpu}{}, {:.1} s after its start: its kernel cannot run \
         on this machine, or is damaged",
        at(*.rip), after.as_secs_f64()
    )]
    TripleFault {
        /// Which vCPU.
        vcpu: u8,
        /// Where, where that is known.
        rip: Option<u64>,
        /// How long the guest had been running.
        after: Duration,
    },
    /// vCPU {vcpu} cannot go on: {reason}
    #[error("vCPU {vcpu} cannot go on: {reason}")]
    Vcpu {
        /// Which vCPU.
        vcpu: u8,
        /// Why.
        reason: String,
    },
    /// {device} had an uncorrectable error, and the VM was stopped
    #[error(
        "{device} had an uncorrectable error: {what}; the VM was stopped, for data may be damaged. \
         `dmesg` on the host has more; check the device before it is used again, or let the guest \
         live with such errors: on_error=pause or on_error=ignore beside the --device"
    )]
    DeviceError {
        /// The device.
        device: String,
        /// What its registers say.
        what: String,
    },
    /// the guest, which was held after a device's error, was ended by a signal
    #[error(
        "the guest was held after a device's error, and was ended by signal {signal} as it was"
    )]
    EndedHeld {
        /// The signal's number.
        signal: i32,
    },
    /// a BAR does not fit into a slot's windows
    #[error(
        "{device}: {bar} of {} does not fit into its slot, which has {} of {window}{}",
        Amount(*size),
        Amount(*room),
        match window {
            WindowKind::Memory64 => ": start the VM with --platform hotplug_mmio64=SIZE",
            _ => ": give the VM the device when it starts",
        }
    )]
    SlotTooSmall {
        /// The device.
        device: String,
        /// Its BAR.
        bar: BarIndex,
        /// Its bytes.
        size: u64,
        /// Which of the slot's windows.
        window: WindowKind,
        /// The window's bytes.
        room: u64,
    },
    /// devices that are added together have to be functions of one
    #[error("these are functions of several devices: add one device after the other")]
    SeveralDevices,
    /// a thread of Busway's panicked, and the VM was ended in order
    #[error(
        "a thread of Busway's panicked, as is said above, and the VM was ended; its devices were reset \
         and closed, as at any end"
    )]
    Panicked,
    /// the guest told KVM that it has crashed
    #[error("the guest told KVM that it has crashed; its console has more")]
    Crashed,
    /// stopped by a signal before the guest had started
    #[error("stopped by signal {signal} before the guest had started")]
    StoppedEarly {
        /// The signal's number.
        signal: i32,
    },
    /// asked to end before the guest had started
    #[error("asked to end before the guest had started")]
    AskedEarly,
    /// {why} while the VM was {doing}, which was not waited for
    #[error(
        "{why} while the VM was {doing}, and that is not waited for: {}",
        left_open(devices)
    )]
    Unfinished {
        /// What came: a signal, or the end of the time that the VM had.
        why: String,
        /// What it did: ending, restarting, being put together.
        doing: &'static str,
        /// The devices that it still had.
        devices: Vec<String>,
    },
    /// the guest did not power off in time
    #[error(
        "the guest did not power off within {} s of being asked to, and was killed",
        limit.as_secs()
    )]
    DeafGuest {
        /// How long it was given.
        limit: Duration,
    },
    /// the guest was killed by a second signal
    #[error("the guest was killed: signal {signal} came while it was powering off")]
    Killed {
        /// The signal's number.
        signal: i32,
    },
}

fn at(rip: Option<u64>) -> String {
    rip.map(|rip| format!(" at rip {rip:#x}"))
        .unwrap_or_default()
}

/// What becomes of devices that are not waited for. Linux resets a VFIO device when its last descriptor closes
/// (drivers/vfio/pci/vfio_pci_core.c, `vfio_pci_core_disable`).
fn left_open(devices: &[String]) -> String {
    match devices {
        [] => "not all that it had is given back in order".to_owned(),
        devices => format!(
            "Busway has not reset and closed {}; the kernel does so by itself, as far as it can, when it \
             returns from what it does with them, which is a minute at most for each; `dmesg` may say more",
            devices.join(", ")
        ),
    }
}

impl RunError {
    /// That `signal` came while the VM was `doing` something, which is not waited for.
    pub(super) fn unfinished(doing: &'static str, signal: i32, devices: &OpenDevices) -> Self {
        Self::Unfinished {
            why: format!("signal {signal} came"),
            doing,
            devices: devices.names(),
        }
    }

    /// For `map_err` on a system call.
    pub(super) fn system(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { what, source }
    }

    /// Whether a file system has no room for what was to be made, or none for this user.
    fn is_want_of_room(&self) -> bool {
        match self {
            Self::Console { source, .. } => source.is_want(),
            Self::Vsock(VsockError::Socket { source, .. }) => source.is_want(),
            Self::Firmware(FirmwareError::Store { source, .. }) => is_no_room(source),
            _ => false,
        }
    }

    /// The exit status, of [`crate::exit`].
    #[must_use]
    pub fn exit_status(&self) -> u8 {
        match self {
            _ if self.is_want_of_room() => HOST,
            Self::NotReady { error, .. } => error.exit_status(),
            Self::Firmware(FirmwareError::NotInstalled { .. }) => HOST,
            Self::Config(_)
            | Self::Boot(_)
            | Self::Firmware(_)
            | Self::Disk(_)
            | Self::Rom(_)
            | Self::Rng(_)
            | Self::Balloon(_)
            | Self::Mem(_)
            | Self::Console { .. }
            | Self::Inherited(_)
            | Self::NoSlot { .. }
            | Self::PortSlot { .. }
            | Self::SlotTaken { .. }
            | Self::NoSegment { .. }
            | Self::SplitDevice(_)
            | Self::NoEcamRoom { .. }
            | Self::Vsock(VsockError::Config { .. } | VsockError::Socket { .. })
            | Self::Pmem(PmemError {
                source:
                    PmemFault::Config(_)
                    | PmemFault::Open { .. }
                    | PmemFault::Kind { .. }
                    | PmemFault::Locked { .. }
                    | PmemFault::NoSize { .. }
                    | PmemFault::Size { .. }
                    | PmemFault::TooShort { .. },
                ..
            })
            | Self::Net(
                NetError::Config { .. }
                | NetError::Tap {
                    source:
                        TapError::NotInherited { .. }
                        | TapError::NoTap { .. }
                        | TapError::Kind { .. }
                        | TapError::Several { .. },
                    ..
                },
            )
            | Self::VhostUser(
                VhostUserError::Config { .. }
                | VhostUserError::BackEnd {
                    source: BackEndError::PrivateMemory | BackEndError::Queues { .. },
                    ..
                },
            )
            | Self::Device(DeviceError::NotPci { .. } | DeviceError::Twice { .. })
            | Self::Ram(
                RamError::Empty
                | RamError::Unaligned(_)
                | RamError::NotWholeHugePages { .. }
                | RamError::ZonePlace { .. },
            ) => USAGE,
            Self::Kvm(
                KvmError::Unavailable { .. }
                | KvmError::MissingCapability(_)
                | KvmError::ApiVersion(_)
                | KvmError::TooManyVcpus { .. }
                | KvmError::ApicId { .. }
                | KvmError::Place { .. },
            )
            | Self::Ram(_)
            | Self::Prefault(_)
            | Self::Regions(_)
            | Self::Net(_)
            | Self::VhostUser(_)
            | Self::Pmem(_)
            | Self::Vsock(_)
            | Self::Tpm(_)
            | Self::DmaSpace(_)
            | Self::Memlock(_)
            | Self::PeerToPeer(_)
            | Self::Device(_)
            | Self::Function(_)
            | Self::NoRoom(_)
            | Self::Plug(_)
            | Self::Pluggable(_)
            | Self::Placing(_)
            | Self::CoreScheduling { .. }
            | Self::Landlock(LandlockError::Missing(_) | LandlockError::Kernel(_))
            | Self::Addresses(_) => HOST,
            Self::Landlock(LandlockError::Path { .. }) => USAGE,
            _ => RUNTIME,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_file_system_has_no_room_for_is_the_hosts_want_and_what_is_not_there_is_none() {
        let store = |errno| {
            RunError::Firmware(FirmwareError::Store {
                vars: "/vm.vars".into(),
                what: "it cannot be made",
                source: io::Error::from_raw_os_error(errno),
            })
        };
        for errno in [libc::ENOSPC, libc::EDQUOT] {
            assert_eq!(store(errno).exit_status(), HOST);
            let said = store(errno).to_string();
            assert!(
                said.contains("/vm.vars") && said.contains("quota"),
                "{said}"
            );
        }
        assert_eq!(store(libc::ENOENT).exit_status(), USAGE);
    }
}
