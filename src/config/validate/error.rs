//! Why a configuration is none.

use std::fmt;

use crate::config::limits::{
    INTERFACE_NAME, MAX_CPUS, MAX_HOTPLUG_SLOTS, MAX_IDENTITY, MAX_NET_QUEUES, MAX_OEM_STRINGS,
    MAX_POWER_OFF_TIMEOUT, MAX_QUEUES, MAX_REMOVAL_TIMEOUT, MIN_CONSOLE_FILE_SIZE, MIN_MEMORY,
    MIN_MTU, SERIAL_SIZE, TAG_SIZE,
};
use crate::config::{InvalidPlace, MAX_SEGMENTS};

/// Why a configuration is none. Each message is whole: what, on which device, why, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidConfig {
    /// nothing to boot: give a kernel with --kernel FILE (a bzImage, or an ELF file with a PVH entry), or a disk that firmware can boot, with --disk or --device
    #[error(
        "nothing to boot: give a kernel with --kernel FILE (a bzImage, or an ELF file with a PVH entry), or a \
         disk that firmware can boot, with --disk path=FILE or --device ADDRESS"
    )]
    NoKernel,
    /// --landlock-rules without --landlock
    #[error(
        "--landlock-rules says what else may be opened where Landlock bounds the process: give --landlock true, or \
         leave the rules out"
    )]
    LandlockRules,
    /// --jail with a pseudo-terminal
    #[error(
        "--jail: a pseudo-terminal is made by the host's /dev/ptmx, which is in no jail: give --{0} socket=PATH, file=PATH \
         or tty instead of pty, or leave --jail out"
    )]
    JailTerminal(&'static str),
    /// {device}: boot_index= without firmware
    #[error(
        "{device}: boot_index= is for firmware: give --firmware auto, or leave boot_index= out"
    )]
    BootIndexAlone {
        /// The device.
        device: Name,
    },
    /// {what} without --kernel
    #[error("{what} is for a kernel: give that with --kernel FILE, or leave {what} out")]
    NeedsKernel {
        /// The flag.
        what: &'static str,
    },
    /// --cpus boot={boot}: a VM has 1 to 255 processors
    #[error("--cpus boot={boot}: a VM has 1 to {MAX_CPUS} processors")]
    Cpus {
        /// What was asked for.
        boot: u8,
    },
    /// --cpus max={max}: must be from boot={boot} to 255
    #[error("--cpus max={max}: must be from boot={boot} to {MAX_CPUS}")]
    MaxCpus {
        /// What was asked for.
        max: u8,
        /// Processors at boot.
        boot: u8,
    },
    /// --cpus {0}
    #[error("--cpus {0}")]
    CpuPlaces(String),
    /// --cpus topology=: {0}
    #[error("--cpus topology=: {0}")]
    Topology(super::super::TopologyError),
    /// --memory size={size}: a guest needs 16M at least
    #[error(
        "--memory size={size}: a guest needs {}M at least; a size is in bytes, or has K, M, G or T \
         after it",
        MIN_MEMORY >> 20
    )]
    TooLittleMemory {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// --memory size={size}: must be a multiple of {step} bytes
    #[error("--memory size={size}: must be a multiple of {step} bytes ({what})")]
    UnevenMemory {
        /// What was asked for, in bytes.
        size: u64,
        /// What it must be a multiple of.
        step: u64,
        /// What that is.
        what: &'static str,
    },
    /// --memory hugepage_size={size}: huge pages are a power of two, 2M or more
    #[error("--memory hugepage_size={size}: a huge page's size is a power of two, 2M or more")]
    HugePageSize {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// --memory hugepage_size= without huge pages
    #[error("--memory hugepage_size= needs hugepages=on beside it")]
    HugePageSizeAlone,
    /// --memory {0}
    #[error("--memory {0}")]
    Hotplug(super::super::InvalidHotplug),
    /// --memory-zone {0}
    #[error("--memory-zone {0}")]
    Zone(super::super::InvalidZone),
    /// --place auto beside {what}
    #[error(
        "--place auto says where RAM and vCPUs are by where the devices are, and so does {what}: leave one of the two out"
    )]
    Placed {
        /// The flag that says the same.
        what: &'static str,
    },
    /// --numa {0}
    #[error("--numa {0}")]
    Numa(super::super::InvalidNuma),
    /// --balloon size={size}: must be a multiple of 4096 bytes, and no more than the guest has
    #[error(
        "--balloon size={size}: it must be a multiple of 4096 bytes, and no more than --memory size="
    )]
    Balloon {
        /// What was asked for, in bytes.
        size: u64,
    },
    /// --balloon block={block}: must be a power of two from 2M to 128M
    #[error("--balloon block={block}: it must be a power of two from 2M to 128M")]
    BalloonBlock {
        /// What was asked for, in bytes.
        block: u64,
    },
    /// --balloon block= without vfio=remap
    #[error("--balloon block= needs vfio=remap beside it: else RAM is mapped for devices whole")]
    BalloonBlockAlone,
    /// --balloon beside hugepages=on
    #[error(
        "--balloon beside --memory hugepages=on: a guest gives back single pages of 4 KiB, which the host cannot take \
         out of a huge page: leave one of the two out"
    )]
    BalloonOfHugePages,
    /// {device}: {why}
    #[error("{device}: {why}")]
    Virtio {
        /// The device whose configuration is wrong.
        device: Name,
        /// What is wrong with it.
        why: InvalidVirtio,
    },
    /// {device}: {why}
    #[error("{device}: {why}")]
    Address {
        /// The device whose configuration is wrong.
        device: Name,
        /// What is wrong with it.
        why: busway_vfio::ParseHostNameError,
    },
    /// {device}: vf_token={why}
    #[error("{device}: vf_token={why}")]
    VfToken {
        /// The device whose configuration is wrong.
        device: Name,
        /// What is wrong with it.
        why: busway_vfio::ParseVfTokenError,
    },
    /// --platform: uuid={0}
    #[error("--platform: uuid={0}")]
    Uuid(busway_iommu::ParseUuidError),
    /// --platform: a text in {key}= is empty, or has a zero byte in it
    #[error(
        "--platform: {key}= has a text that is empty or has a zero byte in it, which SMBIOS cannot tell: give \
         another, or leave it out"
    )]
    IdentityText {
        /// What it was given as.
        key: &'static str,
    },
    /// --platform: {count} strings are more than the 255 that a guest can be told
    #[error(
        "--platform: oem_strings= has {count} strings, and a guest can be told {MAX_OEM_STRINGS}"
    )]
    OemStrings {
        /// How many there are.
        count: usize,
    },
    /// --platform: serial_number= and oem_strings= have {size} bytes, more than there is room for
    #[error(
        "--platform: serial_number= and oem_strings= have {size} bytes together, and there is room for \
         {MAX_IDENTITY}: give what is longer by a disk or by --initramfs"
    )]
    IdentitySize {
        /// Bytes, with a zero behind each text.
        size: usize,
    },
    /// {first} and {second} have the same {what}
    #[error("{first} and {second} have the same {what}, `{value}`: {remedy}")]
    Twice {
        /// The one that came first.
        first: Name,
        /// The one that came after it.
        second: Name,
        /// What is the same.
        what: &'static str,
        /// What it is.
        value: String,
        /// What to do.
        remedy: &'static str,
    },
    /// --serial and --console cannot both have the terminal
    #[error(
        "--serial tty and --console tty: there is one terminal; give one of them off, pty, \
         file=PATH or socket=PATH"
    )]
    OneTerminal,
    /// {flag} size={size}: too small
    #[error(
        "{flag} size={size}: a console's file needs room for {MIN_CONSOLE_FILE_SIZE} bytes at least"
    )]
    ConsoleFileSize {
        /// The flag.
        flag: Name,
        /// What was asked for, in bytes.
        size: u64,
    },
    /// {device}: rom=off and romfile= exclude each other
    #[error("{device}: rom=off and romfile= exclude each other: leave one out")]
    RomfileUnwanted {
        /// The device.
        device: Name,
    },
    /// {device}: x_nv_gpudirect_clique={clique} is above 15
    #[error("{device}: x_nv_gpudirect_clique={clique} must be a number from 0 to 15")]
    Clique {
        /// The device.
        device: Name,
        /// What was given.
        clique: u8,
    },
    /// {device}: fd={fd} is standard input, output or error
    #[error(
        "{device}: {key}={fd} is standard input, output or error: pass the descriptor as \
         another number, 3 or more"
    )]
    StandardFd {
        /// The device whose configuration is wrong.
        device: Name,
        /// `fd` or `iommufd_fd`.
        key: &'static str,
        /// What was asked for.
        fd: u32,
    },
    /// --platform num_pci_segments={segments}
    #[error("--platform num_pci_segments={segments}: a VM has 1 to {MAX_SEGMENTS} PCI segments")]
    Segments {
        /// What was asked for.
        segments: u16,
    },
    /// --platform num_pci_segments={segments} with firmware
    #[error(
        "--platform num_pci_segments={segments}: firmware knows segment 0 alone, and gives out addresses without regard to \
         what is in others: boot the kernel directly (--kernel, without --firmware), or leave num_pci_segments= out"
    )]
    FirmwareSegments {
        /// What was asked for.
        segments: u16,
    },
    /// {device}: {why}
    #[error("{device}: {why}")]
    Place {
        /// The device that is to be there.
        device: Name,
        /// What is wrong with it.
        why: InvalidPlace,
    },
    /// --platform hotplug_slots={slots}
    #[error("--platform {key}={slots}: a VM has 0 to {MAX_HOTPLUG_SLOTS} empty slots in a segment")]
    HotplugSlots {
        /// The key.
        key: &'static str,
        /// What was asked for.
        slots: u8,
    },
    /// --platform hotplug_mmio64={size}
    #[error(
        "--platform hotplug_mmio64={size}: the room for a slot is a multiple of 1 MiB, and 1 MiB at least"
    )]
    HotplugRoom {
        /// Bytes that were asked for.
        size: u64,
    },
    /// --platform removal_timeout={seconds}
    #[error(
        "--platform removal_timeout={seconds}: a guest has 1 to {MAX_REMOVAL_TIMEOUT} seconds to release a device"
    )]
    RemovalTimeout {
        /// What was asked for.
        seconds: u32,
    },
    /// --platform power_off_timeout={seconds}
    #[error(
        "--platform power_off_timeout={seconds}: a guest has 1 to {MAX_POWER_OFF_TIMEOUT} seconds to power off"
    )]
    PowerOffTimeout {
        /// What was asked for.
        seconds: u32,
    },
    /// --platform iommufd_fd={fd} with iommufd=off
    #[error("--platform iommufd_fd={fd} contradicts iommufd=off beside it: leave one of them out")]
    IommufdOff {
        /// What was asked for.
        fd: u32,
    },
    /// {device}: `{id}` is no name
    #[error("{device}: id=`{id}` must have a character, and no spaces, commas or `/`")]
    Id {
        /// The device whose configuration is wrong.
        device: Name,
        /// What was asked for.
        id: String,
    },
}

/// What a virtio device cannot be, whoever asks for it: [`VmConfig::validate`] as well as the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidVirtio {
    /// num_queues={0} must be from 1 to 64
    #[error("num_queues={0} must be from 1 to {MAX_QUEUES}")]
    Queues(u16),
    /// num_queues={0} must be even, from 2 to 128
    #[error(
        "num_queues={0} must be even, from 2 to {MAX_NET_QUEUES}: a receive and a transmit queue for each \
         pair"
    )]
    Pairs(u16),
    /// cid={0} must be from 3 to 4294967294: those before are the host's own
    #[error(
        "cid={0} must be from 3 to 4294967294: 0 to 2 are the host's own, such as 2 for itself"
    )]
    Cid(u32),
    /// queue_size={size} must be a power of two from {least} to {most}
    #[error("queue_size={size} must be a power of two from {least} to {most}")]
    QueueSize {
        /// What was asked for.
        size: u16,
        /// The least that there can be.
        least: u16,
        /// The most.
        most: u16,
    },
    /// queue_affinity names queue {queue}, and there are {queues}, counted from 0
    #[error("queue_affinity names queue {queue}, and num_queues={queues}, counted from 0")]
    AffinityQueue {
        /// The queue that there is not.
        queue: u16,
        /// How many there are.
        queues: u16,
    },
    /// queue_affinity says twice where queue {0} runs
    #[error("queue_affinity says twice where queue {0} runs")]
    AffinityTwice(u16),
    /// serial is longer than 20 characters, or has others than printable ASCII
    #[error("serial=`{0}` must be printable ASCII, and no longer than {SERIAL_SIZE} characters")]
    Serial(String),
    /// {key}_size= and {key}_refill_time= go together
    #[error(
        "{key}_size= and {key}_refill_time= go together, and neither is 0; a burst goes with both"
    )]
    Bucket {
        /// `bw` or `ops`.
        key: &'static str,
    },
    /// backing_files=on goes with image_type=qcow2
    #[error("backing_files=on goes with image_type=qcow2: no other image names files")]
    BackingFiles,
    /// tag=`{0}` must have 1 to 36 bytes
    #[error("tag=`{0}` must have 1 to {TAG_SIZE} bytes, none of them 0: the guest mounts by it")]
    Tag(String),
    /// no socket=
    #[error("socket=PATH is missing: where the back end listens that serves the device")]
    NoSocket,
    /// no file=
    #[error("file=PATH is missing: what the memory is")]
    NoFile,
    /// size={0} is no multiple of 2 MiB
    #[error("size={0} must be a multiple of 2 MiB (2097152), and not 0")]
    PmemSize(u64),
    /// virtio_id={0} is no kind of virtio device
    #[error(
        "virtio_id={0} must be from 1 to 63: virtio's numbers of kinds of devices, as 4 for rng"
    )]
    VirtioId(u16),
    /// virtio_id={0} has to do with what memory the VM has
    #[error(
        "virtio_id={0} has to do with what memory the VM has, which no other process can change: Busway has --balloon and --pmem of its own"
    )]
    OfTheVmm(u16),
    /// virtio_id=1 is a network card
    #[error(
        "virtio_id=1 is a network card: say --net vhost_user=on,socket=PATH, which knows of its pairs of queues"
    )]
    GenericNet,
    /// queue_sizes= has {0} queues
    #[error("queue_sizes= must have 1 to 64 sizes, one for each queue, and has {0}")]
    QueueSizes(usize),
    /// config_size={0} is more than 4096
    #[error("config_size={0} must be 4096 at most")]
    ConfigSize(u16),
    /// socket= without vhost_user=on
    #[error(
        "socket= is for vhost_user=on, with which another process serves the device: give both or none"
    )]
    SocketAlone,
    /// {0} is the back end's to decide
    #[error(
        "{0} is for the process to decide that serves the device (vhost_user=on): leave it out"
    )]
    BackEndsChoice(&'static str),
    /// {0} is for a device of another process's
    #[error("{0} is for a device of another process's (vhost_user=on): give both or none")]
    OnlyOfBackEnds(&'static str),
    /// spoofchk=on and vhost=on: the host's kernel does not look at the guest's addresses
    #[error(
        "spoofchk=on and vhost=on: the host's kernel does not look at the guest's addresses; leave vhost= out, and Busway \
         serves the NIC"
    )]
    SourcesByKernel,
    /// mtu={0} must be from 68 to 65535
    #[error("mtu={0} must be from {MIN_MTU} to 65535")]
    Mtu(u16),
    /// `{0}` is no name for a network interface
    #[error(
        "`{0}` is no name for a network interface: 1 to {INTERFACE_NAME} characters, without spaces, \
         `/` and `:`"
    )]
    TapName(String),
    /// both tap= and fd= say which tap
    #[error("both tap= and fd= say which tap: leave one out")]
    TwoTaps,
    /// fd= has {files} descriptors, and num_queues={queues}
    #[error(
        "{files} of a tap's descriptors (fd=) are for num_queues={}, one for each pair of queues, and \
         num_queues={queues}",
        .files.saturating_mul(2)
    )]
    TapFiles {
        /// How many descriptors there are.
        files: usize,
        /// How many queues were asked for.
        queues: u16,
    },
    /// id=`{0}` must have a character, and no spaces, commas or `/`
    #[error("id=`{0}` must have a character, and no spaces, commas or `/`")]
    Id(String),
}

/// A device of the configuration, by the name it has or else by where it was said: `--disk no. 2`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    pub(super) fn of(flag: &str) -> Self {
        Self(flag.to_owned())
    }

    pub(in crate::config) fn new(flag: &str, index: usize, id: Option<&String>) -> Self {
        match id {
            Some(id) => Self(format!("{flag} id={id}")),
            None => Self::numbered(flag, index),
        }
    }

    pub(super) fn numbered(flag: &str, index: usize) -> Self {
        Self(format!("{flag} no. {}", index.saturating_add(1)))
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}
