//! The threads of a VM's vCPUs: started, held, resumed and ended together.

use std::fmt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::error::KvmError;
use super::gate::{Gate, Turn};
use super::kick::{self, Kick};
use super::run::{self, Buses, ExitCounts, ExitKind, Left, VcpuEvent};
use super::stats_fd::VcpuStats;
use super::vm::Vm;
use crate::arch::{CpuModel, Vcpu, create_vcpus};
use crate::sandbox::{self, Kind};

/// A vCPU's thread runs devices' register accesses and little else.
const STACK: usize = 512 << 10;

/// What one vCPU has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuSeen {
    /// Exits to user space, by kind.
    pub exits: [(&'static str, u64); ExitKind::ALL.len()],
    /// What KVM counts, by its names: all exits, interrupts, page faults and others. Empty where the host's KVM does
    /// not (Linux before 5.14).
    pub kvm: Vec<(&'static str, u64)>,
}

/// Is told what a vCPU cannot deal with; called on its thread.
pub type EventSink = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

/// All vCPUs of a VM. They are held at first. Dropping ends the threads.
pub struct Vcpus {
    gate: Arc<Gate>,
    vcpus: Vec<Thread>,
}

struct Thread {
    vcpu: Arc<Mutex<Vcpu>>,
    counts: Arc<ExitCounts>,
    /// What KVM counts of it, where the host's does.
    stats: Option<VcpuStats>,
    kick: Kick,
    thread: Option<JoinHandle<()>>,
}

impl fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vcpus")
            .field("count", &self.vcpus.len())
            .finish_non_exhaustive()
    }
}

impl Vcpus {
    /// Makes `count` vCPUs (1 to 64) and their threads.
    ///
    /// # Errors
    /// [`KvmError`]
    pub fn new(
        vm: &Vm,
        model: &CpuModel,
        count: u8,
        buses: &Buses,
        events: &EventSink,
    ) -> Result<Self, KvmError> {
        kick::prepare_signal();
        let mut all = Self {
            gate: Arc::default(),
            vcpus: Vec::with_capacity(count.into()),
        };
        for vcpu in create_vcpus(vm, model, count)? {
            all.start(vcpu, buses.clone(), events.clone())?;
        }
        // A thread names itself: whoever is told that the VM runs finds each by its name.
        all.gate.wait_for(all.vcpus.len());
        Ok(all)
    }

    fn start(&mut self, vcpu: Vcpu, buses: Buses, events: EventSink) -> Result<(), KvmError> {
        let id = vcpu.id;
        let failed = |source| KvmError::Thread { id, source };
        let kick = Kick::new(&vcpu.fd).map_err(failed)?;
        // Once it runs, KVM gives it to nobody.
        let stats = VcpuStats::of(&vcpu.fd);
        let (vcpu, counts) = (Arc::new(Mutex::new(vcpu)), Arc::new(ExitCounts::default()));
        let body = {
            let (gate, vcpu, counts) = (self.gate.clone(), vcpu.clone(), counts.clone());
            move || {
                sandbox::enter(Kind::Vcpu);
                thread_body(&gate, &vcpu, &buses, &counts, &events);
            }
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK)
            .spawn(body)
            .map_err(failed)?;
        self.vcpus.push(Thread {
            vcpu,
            counts,
            stats,
            kick,
            thread: Some(thread),
        });
        Ok(())
    }

    /// Sets the boot processor's entry: `apply` sets the system registers and gives the general
    /// ones. To be called while the vCPUs are held.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn enter(&self, apply: impl FnOnce(&mut kvm_sregs) -> kvm_regs) -> Result<(), KvmError> {
        match self.vcpus.first() {
            Some(boot) => lock(&boot.vcpu).enter(apply),
            None => Ok(()),
        }
    }

    /// Puts every vCPU into its state at power-on. To be called while they are held.
    ///
    /// # Errors
    /// [`KvmError::Ioctl`]
    pub fn reset(&self) -> Result<(), KvmError> {
        self.vcpus.iter().try_for_each(|thread| {
            thread.counts.set_started(false);
            lock(&thread.vcpu).reset()
        })
    }

    /// Lets the guest run.
    pub fn resume(&self) {
        self.gate.open();
    }

    /// Stops the guest between two instructions, and returns when no vCPU is in it. That can take as long
    /// as the kernel needs for what a vCPU has it do, such as a minute for the reset of a device.
    pub fn hold(&self) {
        self.stop();
        self.gate.wait_for(self.vcpus.len());
    }

    /// Stops the guest between two instructions, without waiting for that.
    pub fn stop(&self) {
        self.gate.close();
        self.kick();
    }

    /// Stops the guest between two instructions, without waiting for that: `then` is called when no vCPU
    /// is in it, on any thread, unless the guest runs again before.
    pub fn stop_then(&self, then: impl FnOnce() + Send + 'static) {
        self.gate.close();
        self.gate.when_parked(self.vcpus.len(), then);
        self.kick();
    }

    /// Has the guest's clock say that the guest was stopped, so that its watchdogs do not take the time
    /// for a lock-up. To be called while the vCPUs are held, before the guest goes on.
    /// KVM API, KVM_KVMCLOCK_CTRL
    pub fn tell_of_stop(&self) {
        for thread in &self.vcpus {
            let vcpu = lock(&thread.vcpu);
            // EINVAL: the guest does not use that clock.
            if let Err(error) = vcpu.fd.kvmclock_ctrl()
                && error.errno() != libc::EINVAL
            {
                log::debug!("KVM_KVMCLOCK_CTRL failed on vCPU {}: {error}", vcpu.id);
            }
        }
    }

    /// The numbers of those that execute instructions, or are halted: the first, and those that the guest has started.
    pub fn started(&self) -> impl Iterator<Item = u8> {
        let numbered = (0..=u8::MAX).zip(&self.vcpus);
        numbered
            .filter(|(id, thread)| *id == 0 || thread.counts.is_started())
            .map(|(id, _)| id)
    }

    /// Exits to user space of one kind, of all vCPUs together.
    #[must_use]
    pub fn exits(&self, kind: ExitKind) -> u64 {
        self.vcpus
            .iter()
            .map(|thread| thread.counts.get(kind))
            .sum()
    }

    /// What each has done, in the order of their numbers. Waits for none of them.
    #[must_use]
    pub fn seen(&self) -> Vec<VcpuSeen> {
        let seen = |thread: &Thread| VcpuSeen {
            exits: ExitKind::ALL.map(|kind| (kind.name(), thread.counts.get(kind))),
            kvm: thread
                .stats
                .as_ref()
                .map(VcpuStats::read)
                .unwrap_or_default(),
        };
        self.vcpus.iter().map(seen).collect()
    }

    fn kick(&self) {
        for thread in &self.vcpus {
            if let Some(handle) = &thread.thread {
                thread.kick.kick(handle.as_pthread_t());
            }
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.gate.end();
        self.kick();
        for thread in &mut self.vcpus {
            if let Some(Err(_)) = thread.thread.take().map(JoinHandle::join) {
                log::error!("a vCPU's thread had panicked");
            }
        }
    }
}

fn lock(vcpu: &Mutex<Vcpu>) -> MutexGuard<'_, Vcpu> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Keeps the others from waiting for a thread that panicked, and reports that.
struct LeaveGuard<'a> {
    gate: &'a Gate,
    events: &'a EventSink,
    id: u8,
}

impl Drop for LeaveGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.gate.gone();
            (self.events)(VcpuEvent::Failed {
                id: self.id,
                reason: "its thread panicked; this is an error in Busway".to_owned(),
            });
        }
    }
}

fn thread_body(
    gate: &Gate,
    vcpu: &Mutex<Vcpu>,
    buses: &Buses,
    counts: &ExitCounts,
    events: &EventSink,
) {
    let id = lock(vcpu).id;
    let _leave = LeaveGuard { gate, events, id };
    let mut last = Turn::default();
    while let Some(turn) = gate.pass(last) {
        last = turn;
        let mut vcpu = lock(vcpu);
        let event = loop {
            let left = run::run(&mut vcpu, buses, counts);
            // The flag first, then the gate: who closes the gate sets the flag after it.
            vcpu.fd.set_kvm_immediate_exit(0);
            match left {
                Left::Kicked if gate.is_on(turn) => {}
                Left::Kicked => break None,
                Left::Event(event) => break Some(event),
            }
        };
        drop(vcpu);
        if let Some(event) = event {
            events(event);
        }
    }
}
