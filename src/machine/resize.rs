//! How many processors the guest has: more when it is asked for more, fewer when it has released them.
//!
//! A processor that is asked of the guest is out of it once the guest has said so and its vCPU's thread has put it aside,
//! which nobody waits for. What the guest refuses, or does not release in time, it keeps, and whoever asked is told.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::RunError;
use super::events::Events;
use super::requests::{Answer, Asker, RequestError};
use crate::arch::{gsi, layout};
use crate::config::CpusConfig;
use crate::devices::cpu_hotplug::{self, CpuHotplug, CpuSet};
use crate::kvm::{Buses, IrqRouter, KvmError, Vcpus};
use crate::monitor::{self, Source};

/// The vCPUs of a machine, as far as they come and leave.
pub(super) trait Seats {
    /// The guest has vCPU `cpu` from now on.
    fn bring(&mut self, cpu: u8) -> Result<(), KvmError>;

    /// vCPU `cpu` is to be put aside, which is said when it is so.
    fn put_aside(&self, cpu: u8);

    /// vCPU `cpu` is none of the guest's from its next start on.
    fn take_out(&self, cpu: u8);
}

impl Seats for Vcpus {
    fn bring(&mut self, cpu: u8) -> Result<(), KvmError> {
        Self::bring(self, cpu)
    }

    fn put_aside(&self, cpu: u8) {
        Self::put_aside(self, cpu);
    }

    fn take_out(&self, cpu: u8) {
        Self::take_out(self, cpu);
    }
}

/// Somebody's wish for a number of processors.
#[derive(Debug)]
pub(super) struct Wish {
    pub(super) count: u16,
    /// Whether they wait for what the guest does.
    pub(super) wait: bool,
    pub(super) asker: Asker,
    /// How long the guest has to release processors.
    pub(super) limit: Duration,
}

/// The processors of a machine.
#[derive(Debug)]
pub(super) struct ProcessorCount {
    registers: Arc<CpuHotplug>,
    most: u8,
    /// The guest is prepared for another number.
    can_change: bool,
    /// Those that the guest has released and whose threads are about to put them aside.
    parking: CpuSet,
    shrinking: Option<Shrinking>,
}

/// Processors that the guest is asked for.
#[derive(Debug)]
struct Shrinking {
    /// Those of which nothing is known yet, or that are being put aside.
    leaving: CpuSet,
    /// Those that it keeps, and why.
    kept: Vec<(u8, Kept)>,
    /// Who waits for what becomes of it.
    asker: Option<Asker>,
    /// By when the guest has to have released them.
    deadline: Option<Instant>,
    limit: Duration,
}

/// Why a guest keeps a processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kept {
    /// By the status of `_OST`.
    Refused(u8),
    /// It said nothing.
    Silent,
}

impl ProcessorCount {
    /// Of a machine about to be put together, with the registers on its bus where the guest is to be prepared.
    ///
    /// # Errors
    /// [`RunError`]: another device has the registers' addresses.
    pub(super) fn new(
        config: &CpusConfig,
        buses: &Buses,
        router: &IrqRouter,
        events: &Arc<Events>,
    ) -> Result<Self, RunError> {
        let line = Arc::new(router.level_line(gsi::CPU_HOTPLUG));
        let registers = Arc::new(CpuHotplug::new(config.boot, line, events.clone()));
        let can_change = config.comes_and_goes();
        if can_change {
            buses.mmio.insert(
                "CPU hot-plug registers",
                layout::CPU_HOTPLUG_START,
                cpu_hotplug::SIZE,
                registers.clone(),
            )?;
        }
        Ok(Self::of(config.most(), can_change, registers))
    }

    fn of(most: u8, can_change: bool, registers: Arc<CpuHotplug>) -> Self {
        Self {
            registers,
            most,
            can_change,
            parking: CpuSet::default(),
            shrinking: None,
        }
    }

    /// Which processors there are.
    pub(super) fn registers(&self) -> &Arc<CpuHotplug> {
        &self.registers
    }

    /// Has a configuration say how many there are.
    pub(super) fn show(&self, config: &mut CpusConfig) {
        let present = self.registers.processors().present.count();
        config.boot = u8::try_from(present).unwrap_or(u8::MAX);
    }

    /// Has the guest have another number of processors. `runs`: whether the guest can be asked for some.
    pub(super) fn resize(&mut self, wish: Wish, runs: bool, seats: &mut impl Seats) {
        if self.shrinking.is_some() || !self.parking.is_empty() {
            return wish.asker.answer(Err(RequestError::Resizing));
        }
        let present = self.registers.processors().present;
        let (now, most) = (present.count(), u16::from(self.most));
        if !(1..=most).contains(&wish.count) {
            let why = format!(
                "{} processors: the VM can have 1 to {most} of them (--cpus max=, cpus.max_vcpus)",
                wish.count
            );
            return wish.asker.answer(Err(RequestError::Invalid(why)));
        }
        if wish.count == now {
            return wish.asker.answer(Ok(Answer::Done));
        }
        if !self.can_change {
            let why = "the VM was started without room for another number of processors: start it with --cpus max=N \
                       (cpus.max_vcpus)";
            return wish
                .asker
                .answer(Err(RequestError::Invalid(why.to_owned())));
        }
        if wish.count < now && !runs {
            let why = "paused, and releases no processor before it goes on";
            return wish.asker.answer(Err(RequestError::State(why)));
        }
        monitor::tell(Source::Vm, "resizing", &[]);
        log::info!("the guest gets {} processors, it had {now}", wish.count);
        if wish.count > now {
            let answer = self.grow(wish.count - now, present, seats);
            monitor::tell(Source::Vm, "resized", &[]);
            wish.asker.answer(answer);
        } else {
            self.shrink(wish, present);
        }
    }

    /// The lowest numbers that are free come first.
    fn grow(
        &self,
        count: u16,
        present: CpuSet,
        seats: &mut impl Seats,
    ) -> Result<Answer, RequestError> {
        let free = (0..self.most).filter(|cpu| !present.has(*cpu));
        for cpu in free.take(count.into()) {
            seats
                .bring(cpu)
                .map_err(|error| RequestError::failed(&error))?;
            self.registers.plugged(cpu);
        }
        Ok(Answer::Done)
    }

    /// The highest numbers go first.
    fn shrink(&mut self, wish: Wish, present: CpuSet) {
        let count = usize::from(present.count().saturating_sub(wish.count));
        let leaving: CpuSet = present.iter().rev().take(count).collect();
        let asker = match wish.wait {
            true => Some(wish.asker),
            false => {
                wish.asker.answer(Ok(Answer::Done));
                None
            }
        };
        self.shrinking = Some(Shrinking {
            leaving,
            kept: Vec::new(),
            asker,
            deadline: Instant::now().checked_add(wish.limit),
            limit: wish.limit,
        });
        for cpu in leaving.iter() {
            self.registers.ask(cpu);
        }
    }

    /// The guest has released a processor.
    pub(super) fn on_ejected(&mut self, cpu: u8, seats: &impl Seats) {
        self.parking.insert(cpu);
        seats.put_aside(cpu);
    }

    /// The vCPU of a processor that the guest has released is put aside.
    pub(super) fn on_parked(&mut self, cpu: u8) {
        self.parking.remove(cpu);
        log::info!("the guest has released processor {cpu}");
        if let Some(shrinking) = &mut self.shrinking {
            shrinking.leaving.remove(cpu);
        }
        self.settle();
    }

    /// The guest keeps a processor.
    pub(super) fn on_refused(&mut self, cpu: u8, status: u8) {
        self.keep(cpu, Kept::Refused(status));
        self.settle();
    }

    /// By when the guest has to have released something.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.shrinking.as_ref()?.deadline
    }

    /// What the guest was asked for and has not released in time it keeps.
    pub(super) fn on_time(&mut self, now: Instant) {
        if self.deadline().is_none_or(|deadline| deadline > now) {
            return;
        }
        if let Some(shrinking) = &mut self.shrinking {
            shrinking.deadline = None;
        }
        let asked = self.registers.processors().asked;
        for cpu in asked.iter() {
            self.registers.withdraw(cpu);
            self.keep(cpu, Kept::Silent);
        }
        self.settle();
    }

    /// The guest starts anew, with the number that it was to have. To be called while the vCPUs are held.
    pub(super) fn on_restart(&mut self, seats: &impl Seats) {
        let parking = std::mem::take(&mut self.parking);
        let leaving = self
            .shrinking
            .as_mut()
            .map(|one| std::mem::take(&mut one.leaving));
        for cpu in parking.iter().chain(leaving.unwrap_or_default().iter()) {
            self.registers.gone(cpu);
            seats.take_out(cpu);
        }
        self.registers.reset();
        self.settle();
    }

    fn keep(&mut self, cpu: u8, why: Kept) {
        if let Some(shrinking) = &mut self.shrinking
            && shrinking.leaving.remove(cpu)
        {
            shrinking.kept.push((cpu, why));
        }
    }

    /// Where it is known of each processor what becomes of it, that is told.
    fn settle(&mut self) {
        let known = |one: &mut Shrinking| one.leaving.is_empty();
        let Some(shrinking) = self.shrinking.take_if(known) else {
            return;
        };
        let answer = match shrinking.kept.is_empty() {
            true => Ok(Answer::Done),
            false => Err(RequestError::Failed(shrinking.why())),
        };
        monitor::tell(Source::Vm, "resized", &[]);
        match (shrinking.asker, answer) {
            (Some(asker), answer) => asker.answer(answer),
            (None, Err(error)) => log::warn!("{error}"),
            (None, Ok(_)) => {}
        }
    }
}

impl Shrinking {
    /// Which processors the guest keeps, and why.
    fn why(&self) -> String {
        let each = self.kept.iter().map(|(cpu, why)| match why {
            Kept::Refused(status) => format!("{cpu} (it refused: status {status:#x} of _OST)"),
            Kept::Silent => format!(
                "{cpu} (it did not answer within {} s: has it a driver for processors that leave?)",
                self.limit.as_secs()
            ),
        });
        let each: Vec<_> = each.collect();
        format!("the guest keeps processor {}", each.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::mpsc::{Receiver, sync_channel};

    use busway_pci::InterruptLevel;

    use super::*;
    use crate::devices::cpu_hotplug::{CpuKeeper, EJECT, OUTCOME};
    use crate::kvm::BusDevice;

    #[derive(Debug)]
    struct Nobody;

    impl InterruptLevel for Nobody {
        fn set(&self, _: bool) {}
    }

    impl CpuKeeper for Nobody {
        fn ejected(&self, _: u8) {}

        fn refused(&self, _: u8, _: u8) {}
    }

    /// What was done to vCPUs.
    #[derive(Debug, Default)]
    struct Noted(RefCell<Vec<(&'static str, u8)>>);

    impl Noted {
        fn taken(&self) -> Vec<(&'static str, u8)> {
            self.0.take()
        }
    }

    impl Seats for Noted {
        fn bring(&mut self, cpu: u8) -> Result<(), KvmError> {
            self.0.borrow_mut().push(("bring", cpu));
            Ok(())
        }

        fn put_aside(&self, cpu: u8) {
            self.0.borrow_mut().push(("aside", cpu));
        }

        fn take_out(&self, cpu: u8) {
            self.0.borrow_mut().push(("out", cpu));
        }
    }

    type Answers = Receiver<Result<Answer, RequestError>>;

    struct Test {
        count: ProcessorCount,
        seats: Noted,
    }

    impl Test {
        fn new(boot: u8, most: u8) -> Self {
            let registers = CpuHotplug::new(boot, Arc::new(Nobody), Arc::new(Nobody));
            Self {
                count: ProcessorCount::of(most, most > boot, Arc::new(registers)),
                seats: Noted::default(),
            }
        }

        fn ask(&mut self, count: u16, wait: bool, runs: bool) -> Answers {
            let (sender, answers) = sync_channel(1);
            let wish = Wish {
                count,
                wait,
                asker: sender.into(),
                limit: Duration::from_secs(30),
            };
            self.count.resize(wish, runs, &mut self.seats);
            answers
        }

        /// The guest releases a processor, and its thread puts it aside.
        fn release(&mut self, cpu: u8) {
            let registers = self.count.registers().clone();
            registers.write(EJECT, &u32::from(cpu).to_le_bytes());
            self.count.on_ejected(cpu, &self.seats);
            self.count.on_parked(cpu);
        }

        fn present(&self) -> Vec<u8> {
            self.count.registers.processors().present.iter().collect()
        }
    }

    fn done(answers: &Answers) -> bool {
        answers.try_recv() == Ok(Ok(Answer::Done))
    }

    #[test]
    fn any_sequence_of_sizes_is_had_and_the_lowest_free_numbers_come_first() {
        let mut test = Test::new(2, 6);
        assert!(done(&test.ask(4, true, true)));
        assert_eq!(test.seats.taken(), [("bring", 2), ("bring", 3)]);
        let waits = test.ask(1, true, true);
        for cpu in [2, 1, 3] {
            assert!(waits.try_recv().is_err());
            test.release(cpu);
        }
        assert!(done(&waits));
        assert_eq!(
            test.seats.taken(),
            [("aside", 2), ("aside", 1), ("aside", 3)]
        );
        assert!(done(&test.ask(1, true, true)), "as many as there are");
        assert!(done(&test.ask(6, true, false)), "paused");
        assert_eq!(test.present(), [0, 1, 2, 3, 4, 5]);
        // Who does not wait is answered when the guest has been asked.
        assert!(done(&test.ask(5, false, true)));
        test.release(5);
        assert_eq!(test.present(), [0, 1, 2, 3, 4]);
        let mut config = CpusConfig::default();
        test.count.show(&mut config);
        assert_eq!(config.boot, 5);
    }

    #[test]
    fn a_wish_while_a_removal_is_pending_and_one_that_cannot_be_are_refused() {
        let mut test = Test::new(3, 4);
        let refused = |answers: Answers| answers.try_recv().unwrap().unwrap_err();
        for wrong in [0, 5, 300] {
            let why = refused(test.ask(wrong, true, true));
            assert!(matches!(&why, RequestError::Invalid(text) if text.contains("1 to 4")));
        }
        let why = refused(test.ask(1, true, false));
        assert!(matches!(why, RequestError::State(_)));
        let waits = test.ask(2, true, true);
        for count in [1, 2, 3, 4] {
            assert_eq!(refused(test.ask(count, true, true)), RequestError::Resizing);
        }
        // Released, but still executing.
        test.count.on_ejected(2, &test.seats);
        assert_eq!(refused(test.ask(4, true, true)), RequestError::Resizing);
        test.count.on_parked(2);
        assert!(done(&waits));
        let mut fixed = Test::new(2, 2);
        let why = refused(fixed.ask(1, true, true));
        assert!(matches!(&why, RequestError::Invalid(text) if text.contains("max=N")));
    }

    #[test]
    fn what_the_guest_refuses_or_does_not_release_in_time_it_keeps_and_the_next_wish_is_taken() {
        let mut test = Test::new(4, 4 + 1);
        let waits = test.ask(1, true, true);
        let busy = 3_u32 | 0x82 << 8 | 3 << 16;
        test.count.registers().write(OUTCOME, &busy.to_le_bytes());
        test.count.on_refused(3, 0x82);
        test.release(2);
        assert!(waits.try_recv().is_err());
        let deadline = test.count.deadline().unwrap();
        test.count.on_time(deadline);
        let Ok(Err(RequestError::Failed(why))) = waits.try_recv() else {
            panic!("it is told what it keeps");
        };
        assert!(
            why.contains("3 (it refused: status 0x82")
                && why.contains("1 (it did not answer within 30 s")
        );
        assert_eq!(
            (test.present(), test.count.deadline()),
            (vec![0, 1, 3], None)
        );
        // One that comes late is put aside all the same.
        test.release(1);
        assert_eq!(test.present(), [0, 3]);
        assert!(done(&test.ask(3, true, true)));
        assert_eq!(test.present(), [0, 1, 3]);
    }

    #[test]
    fn a_guest_that_starts_anew_has_the_number_that_it_was_to_have() {
        let mut test = Test::new(4, 5);
        let waits = test.ask(1, true, true);
        test.count.registers().write(EJECT, &2_u32.to_le_bytes());
        test.count.on_ejected(2, &test.seats);
        test.seats.taken();
        test.count.on_restart(&test.seats);
        let mut out = test.seats.taken();
        out.sort_unstable();
        out.dedup();
        assert_eq!(out, [("out", 1), ("out", 2), ("out", 3)]);
        assert!(done(&waits));
        assert_eq!(test.present(), [0]);
        assert!(done(&test.ask(5, true, true)));
    }
}
