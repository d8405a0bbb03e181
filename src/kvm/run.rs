//! The loop of a vCPU's thread: into the guest, and each exit to the device it is for.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use kvm_bindings::{
    KVM_EXIT_IO_IN, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN,
};
use kvm_ioctls::{VcpuExit, VcpuFd};

use super::AddressMap;
use crate::arch::Vcpu;
use crate::provoked;

/// What the guest's accesses reach.
#[derive(Clone, Debug, Default)]
pub struct Buses {
    /// Guest-physical addresses that are no memory.
    pub mmio: Arc<AddressMap>,
    /// I/O ports.
    pub ports: Arc<AddressMap>,
}

/// Something that a vCPU cannot deal with alone. Its thread waits after telling it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VcpuEvent {
    /// The processor met a fault while it handled a double fault, and shut down.
    TripleFault {
        /// Which vCPU.
        id: u8,
        /// Where, if the processor says so: AMD's forgets.
        rip: Option<u64>,
    },
    /// The guest asked KVM for a reset.
    Reset,
    /// The guest asked KVM to power it off.
    PowerOff,
    /// The guest told KVM that it has crashed.
    Crash,
    /// It is out of the guest, as it was asked to be, and reset.
    Parked {
        /// Which vCPU.
        id: u8,
    },
    /// KVM could not run it.
    Failed {
        /// Which vCPU.
        id: u8,
        /// Why, for a person.
        reason: String,
    },
}

/// Exits to user space of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// `in`
    PortRead,
    /// `out`
    PortWrite,
    /// A read of an address that is no memory.
    MmioRead,
    /// A write to an address that is no memory.
    MmioWrite,
    /// Anything else.
    Other,
}

impl ExitKind {
    /// All of them.
    pub const ALL: [Self; 5] = [
        Self::PortRead,
        Self::PortWrite,
        Self::MmioRead,
        Self::MmioWrite,
        Self::Other,
    ];

    /// Its name in the report.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::PortRead => "pio_read",
            Self::PortWrite => "pio_write",
            Self::MmioRead => "mmio_read",
            Self::MmioWrite => "mmio_write",
            Self::Other => "other",
        }
    }
}

/// How many exits to user space one vCPU made, and whether it has been started. Written by its own thread only, while
/// it runs, and on cache lines of its own.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct ExitCounts {
    exits: [AtomicU64; ExitKind::ALL.len()],
    started: AtomicBool,
}

impl ExitCounts {
    /// Whether the guest has started the vCPU by a SIPI since its reset.
    pub(super) fn is_started(&self) -> bool {
        self.started.load(Ordering::Relaxed)
    }

    pub(super) fn set_started(&self, started: bool) {
        self.started.store(started, Ordering::Relaxed);
    }

    pub(super) fn get(&self, kind: ExitKind) -> u64 {
        self.exits
            .get(kind as usize)
            .map_or(0, |count| count.load(Ordering::Relaxed))
    }

    fn count(&self, kind: ExitKind) {
        if let Some(count) = self.exits.get(kind as usize) {
            // There is one writer, so this needs no locked instruction.
            count.store(count.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
        }
    }
}

/// Why the guest was left.
pub(super) enum Left {
    /// The thread was kicked.
    Kicked,
    /// The machine has to be informed of this.
    Event(VcpuEvent),
}

/// Runs the guest until there is a reason to stop.
pub(super) fn run(vcpu: &mut Vcpu, buses: &Buses, counts: &ExitCounts) -> Left {
    loop {
        provoked::here();
        let id = vcpu.id;
        let event = match vcpu.fd.run() {
            Ok(VcpuExit::MmioRead(address, data)) => {
                counts.count(ExitKind::MmioRead);
                buses.mmio.read(address, data);
                continue;
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                counts.count(ExitKind::MmioWrite);
                buses.mmio.write(address, data);
                continue;
            }
            Ok(VcpuExit::IoIn(..) | VcpuExit::IoOut(..)) => {
                port_access(&mut vcpu.fd, &buses.ports, counts);
                continue;
            }
            Err(error) if error.errno() == libc::EINTR => return Left::Kicked,
            // A vCPU that waited for its SIPI has had it.
            Err(error) if error.errno() == libc::EAGAIN => {
                counts.set_started(true);
                continue;
            }
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::SetTpr) => {
                counts.count(ExitKind::Other);
                continue;
            }
            Ok(VcpuExit::Shutdown) => VcpuEvent::TripleFault { id, rip: None },
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => VcpuEvent::Reset,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => VcpuEvent::PowerOff,
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => VcpuEvent::Crash,
            Ok(VcpuExit::FailEntry(reason, cpu)) => failed(
                id,
                format_args!("the processor ({cpu}) refused its state, with reason {reason:#x}"),
            ),
            Ok(VcpuExit::InternalError) => failed(id, internal_error(&mut vcpu.fd)),
            Ok(VcpuExit::MemoryFault { gpa, size, .. }) => failed(
                id,
                format_args!("the host could not give the memory at {gpa:#x} ({size} bytes)"),
            ),
            Ok(other) => failed(id, format_args!("KVM left it with {other:?}")),
            Err(error) => failed(id, format_args!("KVM_RUN: {error}")),
        };
        counts.count(ExitKind::Other);
        return Left::Event(with_registers(&vcpu.fd, event));
    }
}

fn failed(id: u8, reason: impl fmt::Display) -> VcpuEvent {
    VcpuEvent::Failed {
        id,
        reason: reason.to_string(),
    }
}

/// Says where the vCPU stood, and at trace level all its registers.
fn with_registers(vcpu: &VcpuFd, event: VcpuEvent) -> VcpuEvent {
    /// Where an x86 processor begins, which AMD's is at after a triple fault: KVM has to reset it,
    /// for its state is undefined then.
    const RESET_VECTOR: u64 = 0xfff0;
    let Ok(regs) = vcpu.get_regs() else {
        return event;
    };
    log::trace!("{event:?}: {regs:x?} {:x?}", vcpu.get_sregs());
    match event {
        VcpuEvent::TripleFault { id, .. } => VcpuEvent::TripleFault {
            id,
            rip: Some(regs.rip).filter(|rip| *rip != RESET_VECTOR),
        },
        VcpuEvent::Failed { id, reason } => VcpuEvent::Failed {
            id,
            reason: format!("{reason}, at rip {:#x}", regs.rip),
        },
        other => other,
    }
}

/// An `in` or `out`, with a `rep` before it or not: each element is an access of its own.
fn port_access(vcpu: &mut VcpuFd, ports: &AddressMap, counts: &ExitCounts) {
    let run = vcpu.get_kvm_run();
    // SAFETY: the exit reason was KVM_EXIT_IO, which makes `io` the member that is there.
    let io = unsafe { run.__bindgen_anon_1.io };
    let (width, count) = (usize::from(io.size), io.count as usize);
    if width == 0 {
        return;
    }
    // SAFETY: KVM puts the data of a port access at `data_offset` from the start of `kvm_run`, in the
    // mapping that the descriptor owns and that `run` borrows exclusively, `size * count` bytes long.
    let data = unsafe {
        let start = std::ptr::from_mut(run).cast::<u8>();
        std::slice::from_raw_parts_mut(start.add(io.data_offset as usize), width * count)
    };
    let port = u64::from(io.port);
    for element in data.chunks_exact_mut(width) {
        if u32::from(io.direction) == KVM_EXIT_IO_IN {
            counts.count(ExitKind::PortRead);
            ports.read(port, element);
        } else {
            counts.count(ExitKind::PortWrite);
            ports.write(port, element);
        }
    }
}

fn internal_error(vcpu: &mut VcpuFd) -> String {
    // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, which makes `internal` the member that is
    // there.
    let internal = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.internal };
    let suberror = internal.suberror;
    // linux/kvm.h, KVM_INTERNAL_ERROR_*.
    let meaning = match suberror {
        1 => "an instruction could not be emulated",
        2 => "two exceptions came at once",
        3 => "an event could not be delivered",
        4 => "the exit's reason is unknown",
        _ => "internal error",
    };
    let words = internal.data.iter().take(internal.ndata as usize);
    let data: String = words.map(|word| format!(" {word:#x}")).collect();
    format!("{meaning} (KVM_EXIT_INTERNAL_ERROR {suberror}, data{data})")
}
