//! The threads of a VM's vCPUs: started, held, resumed and ended together.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use kvm_bindings::{kvm_regs, kvm_sregs};

use super::cores::Cores;
use super::error::KvmError;
use super::gate::{Gate, Pass, Turn};
use super::kick::{self, Kick};
use super::places;
use super::run::{self, Buses, ExitCounts, ExitKind, Left, VcpuEvent};
use super::stats_fd::VcpuStats;
use super::vm::Vm;
use crate::arch::{CpuModel, Vcpu, VcpuMaker};
use crate::config::Topology;
use crate::sandbox::{self, Kind};

/// A vCPU's thread runs devices' register accesses and little else.
const STACK: usize = 512 << 10;

/// What one vCPU has done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VcpuSeen {
    /// Its number.
    pub id: u8,
    /// Exits to user space, by kind.
    pub exits: [(&'static str, u64); ExitKind::ALL.len()],
    /// What KVM counts, by its names: all exits, interrupts, page faults and others. Empty where the host's KVM does
    /// not (Linux before 5.14).
    pub kvm: Vec<(&'static str, u64)>,
}

/// Is told what a vCPU cannot deal with; called on its thread.
pub type EventSink = Arc<dyn Fn(VcpuEvent) + Send + Sync>;

/// All vCPUs of a VM. They are held at first. Dropping ends the threads.
///
/// KVM takes no vCPU back, so that one which leaves the guest is put aside: its thread has reset it, and waits. One that
/// comes is made, or is one that was put aside.
pub struct Vcpus {
    gate: Arc<Gate>,
    /// By their numbers.
    vcpus: Vec<Thread>,
    maker: VcpuMaker,
    buses: Buses,
    events: EventSink,
    cores: Cores,
    /// Where those run that have a place.
    places: BTreeMap<u8, Vec<usize>>,
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
    /// Makes the first `count` vCPUs of `topology`, and their threads, which are on cores of the host's as `cores` has it.
    ///
    /// # Errors
    /// [`KvmError`]
    pub fn new(
        vm: &Vm,
        model: &CpuModel,
        topology: Topology,
        count: u8,
        buses: &Buses,
        events: &EventSink,
        cores: Cores,
    ) -> Result<Self, KvmError> {
        kick::prepare_signal();
        let (maker, vcpus) = VcpuMaker::begin(vm, model, topology, count)?;
        let mut all = Self {
            gate: Arc::default(),
            vcpus: Vec::with_capacity(count.into()),
            maker,
            buses: buses.clone(),
            events: events.clone(),
            cores,
            places: BTreeMap::new(),
        };
        for vcpu in vcpus {
            all.start(vcpu)?;
        }
        // A thread names itself: whoever is told that the VM runs finds each by its name.
        all.gate.wait();
        Ok(all)
    }

    /// Which threads are on a core of the host's with them.
    #[must_use]
    pub fn cores(&self) -> &Cores {
        &self.cores
    }

    /// Has vCPUs run on these of the host's processors only, those that come later as well.
    ///
    /// # Errors
    /// [`KvmError::Place`]
    pub fn place(
        &mut self,
        places: impl IntoIterator<Item = (u8, Vec<usize>)>,
    ) -> Result<(), KvmError> {
        self.places = places.into_iter().collect();
        let made = (0..=u8::MAX).zip(&self.vcpus);
        let mut made = made;
        made.try_for_each(|(id, thread)| self.put_in_place(id, thread))
    }

    fn put_in_place(&self, id: u8, thread: &Thread) -> Result<(), KvmError> {
        let Some(cpus) = self.places.get(&id) else {
            return Ok(());
        };
        let Some(handle) = &thread.thread else {
            return Ok(());
        };
        places::run_on(handle.as_pthread_t(), cpus).map_err(|source| KvmError::Place {
            id,
            cpus: cpus.clone(),
            source,
        })
    }

    /// Has the guest have vCPU `id`, as after power-on, until it is put aside: the next that is to be made, or one that
    /// was put aside, which has been said of it.
    ///
    /// # Errors
    /// [`KvmError`]
    pub fn bring(&mut self, id: u8) -> Result<(), KvmError> {
        match self.vcpus.get(usize::from(id)) {
            Some(thread) => {
                thread.counts.set_started(false);
                lock(&thread.vcpu).reset()?;
                self.gate.let_in(id.into());
                Ok(())
            }
            None => {
                let vcpu = self.maker.make(id)?;
                self.start(vcpu)
            }
        }
    }

    /// Takes a vCPU out of the guest, wherever it is in that. Waits for nothing: [`VcpuEvent::Parked`] says when it is
    /// so.
    pub fn put_aside(&self, id: u8) {
        self.gate.put_aside(id.into());
        if let Some(thread) = self.vcpus.get(usize::from(id)) {
            thread.kick();
        }
    }

    /// A vCPU is none of the guest's from its next start on. To be called while the vCPUs are held, before
    /// [`Self::reset`].
    pub fn take_out(&self, id: u8) {
        self.gate.take_out(id.into());
    }

    fn start(&mut self, vcpu: Vcpu) -> Result<(), KvmError> {
        let (buses, events) = (self.buses.clone(), self.events.clone());
        let id = vcpu.id;
        let failed = |source| KvmError::Thread { id, source };
        let kick = Kick::new(&vcpu.fd).map_err(failed)?;
        // Once it runs, KVM gives it to nobody.
        let stats = VcpuStats::of(&vcpu.fd);
        let (vcpu, counts) = (Arc::new(Mutex::new(vcpu)), Arc::new(ExitCounts::default()));
        let body = {
            let (gate, vcpu, counts) = (self.gate.clone(), vcpu.clone(), counts.clone());
            let number = gate.register();
            let cores = self.cores.clone();
            move || {
                if let Err(error) = cores.enter_vcpu() {
                    log::warn!("vCPU {id} shares cores of the host's with others: {error}");
                }
                sandbox::enter(Kind::Vcpu);
                thread_body(&gate, number, &vcpu, &buses, &counts, &events);
            }
        };
        let thread = thread::Builder::new()
            .name(format!("vcpu{id}"))
            .stack_size(STACK)
            .spawn(body)
            .inspect_err(|_| self.gate.forget_last())
            .map_err(failed)?;
        let thread = Thread {
            vcpu,
            counts,
            stats,
            kick,
            thread: Some(thread),
        };
        let placed = self.put_in_place(id, &thread);
        self.vcpus.push(thread);
        placed
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
        (0..).zip(&self.vcpus).try_for_each(|(number, thread)| {
            thread.counts.set_started(false);
            let mut vcpu = lock(&thread.vcpu);
            match self.gate.is_out(number) {
                true => vcpu.park(),
                false => vcpu.reset(),
            }
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
        self.gate.wait();
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
        self.gate.when_parked(then);
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

    /// The APIC ids of those that execute instructions, or are halted: the first, and those that the guest has started.
    pub fn started(&self) -> impl Iterator<Item = u8> {
        let numbered = (0..=u8::MAX).zip(&self.vcpus);
        numbered
            .filter(|(id, thread)| *id == 0 || thread.counts.is_started())
            .filter_map(|(id, _)| u8::try_from(self.maker.apic_id(id)).ok())
    }

    /// Exits to user space of one kind, of all vCPUs together.
    #[must_use]
    pub fn exits(&self, kind: ExitKind) -> u64 {
        self.vcpus
            .iter()
            .map(|thread| thread.counts.get(kind))
            .sum()
    }

    /// What each that the guest has has done, in the order of their numbers. Waits for none of them.
    #[must_use]
    pub fn seen(&self) -> Vec<VcpuSeen> {
        let seen = |(id, thread): (u8, &Thread)| VcpuSeen {
            id,
            exits: ExitKind::ALL.map(|kind| (kind.name(), thread.counts.get(kind))),
            kvm: thread
                .stats
                .as_ref()
                .map(VcpuStats::read)
                .unwrap_or_default(),
        };
        let numbered = (0..=u8::MAX).zip(&self.vcpus);
        numbered
            .filter(|(id, _)| !self.gate.is_out((*id).into()))
            .map(seen)
            .collect()
    }

    fn kick(&self) {
        self.vcpus.iter().for_each(Thread::kick);
    }
}

impl Thread {
    fn kick(&self) {
        if let Some(handle) = &self.thread {
            self.kick.kick(handle.as_pthread_t());
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
    number: usize,
    vcpu: &Mutex<Vcpu>,
    buses: &Buses,
    counts: &ExitCounts,
    events: &EventSink,
) {
    let id = lock(vcpu).id;
    let _leave = LeaveGuard { gate, events, id };
    let mut last = Turn::default();
    loop {
        let turn = match gate.pass(number, last) {
            Pass::Run(turn) => turn,
            Pass::Leave => {
                // Its own thread does this, so that nobody waits for what the vCPU was at.
                counts.set_started(false);
                let parked = lock(vcpu).park();
                gate.left(number);
                events(match parked {
                    Ok(()) => VcpuEvent::Parked { id },
                    Err(error) => VcpuEvent::Failed {
                        id,
                        reason: error.to_string(),
                    },
                });
                continue;
            }
            Pass::End => return,
        };
        last = turn;
        let mut vcpu = lock(vcpu);
        let event = loop {
            let left = run::run(&mut vcpu, buses, counts);
            // The flag first, then the gate: who closes the gate sets the flag after it.
            vcpu.fd.set_kvm_immediate_exit(0);
            match left {
                Left::Kicked if gate.is_on(number, turn) => {}
                Left::Kicked => break None,
                Left::Event(event) => break Some(event),
            }
        };
        drop(vcpu);
        // What one does that the guest has given up is nobody's business.
        if let Some(event) = event.filter(|_| !gate.is_out(number)) {
            events(event);
        }
    }
}
