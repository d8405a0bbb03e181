//! The emulated host: VFIO, KVM and an IOMMU on any machine.
//!
//! A Linux host runs in QEMU with an IOMMU and a zoo of PCI devices; Busway, unchanged, binds its
//! devices and boots guests in it. A test boots a [`Host`], runs scripts and guests there, and reads
//! what came of them as data. When the `Host` is dropped, or this process dies, nothing is left.

mod agent;
mod binding;
pub mod budgets;
mod calls;
pub mod churn;
mod config;
mod cpio;
mod digest;
mod doorbell;
mod emulator;
mod guest;
mod host;
mod inspector;
mod job;
mod lab;
mod machine;
mod matrix;
pub mod page;
mod pagemap;
mod parts;
pub mod pattern;
mod process;
mod program;
mod qmp;
mod saved;
mod scratch;
mod server;
mod snapshot;
pub mod spent;
mod suspect;
mod transcript;
pub mod trials;
mod tsc;
mod watch;
mod works;
mod zoo;

pub use config::{HostConfig, Iommu, Kernel};
pub use cpio::archive;
pub use guest::{BEFORE_FIRMWARE, GuestKernel, GuestResult, GuestRun, RunningGuest, Vmm};
pub use host::Host;
pub use job::{Job, Output};
pub use lab::Lab;
pub use matrix::{Way, record};
pub use pagemap::physical_address;
pub use parts::Parts;
pub use program::{Profile, build_busway, build_lab_io, build_lab_pci, build_static, build_tests};
pub use qmp::Qmp;
pub use server::{DataServer, Upload};
pub use snapshot::{Mapping, Snapshot, Thread};
pub use suspect::{may_be_the_emulators, with_guests_left};
pub use transcript::{Line, Transcript};
pub use works::{
    WORKS, Work, addresses, edu_sends, exact, exact_while_moved, virtual_functions, with_works,
    zoo_host,
};
pub use zoo::{BOOT_FILE, Device, GATEWAY, Kind, NETBOOT, USB_DISK_MIB};
