//! Where vCPU threads wait while the VM does not run.

use std::fmt;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// A run of the VM, from one `open` to the next `close`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Turn(u64);

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Goal {
    #[default]
    Wait,
    Run(Turn),
    End,
}

/// Where a thread's vCPU belongs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Seat {
    /// In the guest.
    #[default]
    In,
    /// In the guest, which has not seen it yet: it runs in the present turn, whatever it has done in that before.
    Fresh,
    /// Out of the guest, once its thread has put it aside.
    Leaving,
    /// Out of the guest.
    Out,
}

/// What a thread does next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pass {
    /// It runs its vCPU.
    Run(Turn),
    /// It puts its vCPU aside, and says so by [`Gate::left`].
    Leave,
    /// It ends.
    End,
}

#[derive(Debug, Default)]
struct State {
    goal: Goal,
    last: Turn,
    /// One for each thread, by its number.
    seats: Vec<Seat>,
    /// Threads that wait here or are gone.
    parked: usize,
    /// What is called when all threads wait or are gone.
    call: Option<Call>,
}

impl State {
    fn all_parked(&self) -> bool {
        self.parked >= self.seats.len()
    }

    fn seat(&self, number: usize) -> Seat {
        self.seats.get(number).copied().unwrap_or_default()
    }

    fn set_seat(&mut self, number: usize, seat: Seat) {
        if let Some(entry) = self.seats.get_mut(number) {
            *entry = seat;
        }
    }
}

struct Call(Box<dyn FnOnce() + Send>);

impl fmt::Debug for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Call")
    }
}

/// The gate. Closed at first.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

impl Gate {
    /// A thread is about to begin; its number. Whoever waits for all waits for it from now on.
    pub(super) fn register(&self) -> usize {
        let mut state = self.state();
        state.seats.push(Seat::In);
        state.seats.len() - 1
    }

    /// The thread that was registered last could not begin.
    pub(super) fn forget_last(&self) {
        let mut state = self.state();
        state.seats.pop();
        self.changed.notify_all();
        drop(self.call(state));
    }

    /// Lets everybody run, also those that gave up their last turn by themselves.
    pub(super) fn open(&self) {
        let mut state = self.state();
        state.last.0 += 1;
        state.goal = Goal::Run(state.last);
        state.call = None;
        self.changed.notify_all();
    }

    /// Asks everybody to wait. They have to be kicked after this, and before [`Self::wait`].
    pub(super) fn close(&self) {
        let mut state = self.state();
        if state.goal != Goal::End {
            state.goal = Goal::Wait;
        }
    }

    /// Asks everybody to end.
    pub(super) fn end(&self) {
        self.state().goal = Goal::End;
        self.changed.notify_all();
    }

    /// Has a thread put its vCPU aside. It has to be kicked after this. Waits for nothing.
    pub(super) fn put_aside(&self, number: usize) {
        let mut state = self.state();
        if matches!(state.seat(number), Seat::In | Seat::Fresh) {
            state.set_seat(number, Seat::Leaving);
        }
        self.changed.notify_all();
    }

    /// A vCPU is out of the guest without its thread's doing. To be called while everybody waits.
    pub(super) fn take_out(&self, number: usize) {
        self.state().set_seat(number, Seat::Out);
    }

    /// A vCPU that is out of the guest comes back.
    pub(super) fn let_in(&self, number: usize) {
        self.state().set_seat(number, Seat::Fresh);
        self.changed.notify_all();
    }

    /// A thread has put its vCPU aside.
    pub(super) fn left(&self, number: usize) {
        let mut state = self.state();
        if state.seat(number) == Seat::Leaving {
            state.set_seat(number, Seat::Out);
        }
    }

    /// Whether a vCPU is out of the guest, or about to be.
    pub(super) fn is_out(&self, number: usize) -> bool {
        matches!(self.state().seat(number), Seat::Leaving | Seat::Out)
    }

    /// Waits until all threads wait or are gone.
    pub(super) fn wait(&self) {
        let state = self.state();
        let _done = self
            .changed
            .wait_while(state, |state| !state.all_parked())
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Has `then` called when all threads wait or are gone, on the thread that is the last to come, or at once where
    /// they all have. It is never called where the gate opens before that.
    pub(super) fn when_parked(&self, then: impl FnOnce() + Send + 'static) {
        let mut state = self.state();
        state.call = Some(Call(Box::new(then)));
        drop(self.call(state));
    }

    /// Calls what waits for all. The lock is not held meanwhile.
    fn call<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let all = state.all_parked();
        match state.call.take_if(|_| all) {
            Some(Call(then)) => {
                drop(state);
                then();
                self.state()
            }
            None => state,
        }
    }

    /// The thread with this `number` waits for a turn after `last`.
    pub(super) fn pass(&self, number: usize, last: Turn) -> Pass {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        let state = self.call(state);
        let waits = |state: &mut State| match (state.goal, state.seat(number)) {
            (Goal::End, _) | (_, Seat::Leaving) => false,
            (_, Seat::Out) | (Goal::Wait, _) => true,
            (Goal::Run(turn), Seat::In) => turn == last,
            (Goal::Run(_), Seat::Fresh) => false,
        };
        let mut state = self
            .changed
            .wait_while(state, waits)
            .unwrap_or_else(PoisonError::into_inner);
        if state.goal == Goal::End {
            return Pass::End;
        }
        state.parked = state.parked.saturating_sub(1);
        match (state.goal, state.seat(number)) {
            (_, Seat::Leaving) => Pass::Leave,
            (Goal::Run(turn), _) => {
                state.set_seat(number, Seat::In);
                Pass::Run(turn)
            }
            (Goal::Wait | Goal::End, _) => Pass::End,
        }
    }

    /// Whether `turn` is still on for a thread.
    pub(super) fn is_on(&self, number: usize, turn: Turn) -> bool {
        let state = self.state();
        state.goal == Goal::Run(turn) && state.seat(number) == Seat::In
    }

    /// A thread is gone without having been told to end.
    pub(super) fn gone(&self) {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        drop(self.call(state));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::thread::{self, JoinHandle};

    /// What threads at a gate have done.
    #[derive(Debug, Default)]
    struct Done {
        turns: AtomicUsize,
        left: AtomicUsize,
    }

    /// A thread that takes each turn that it is given, and puts aside what it is to.
    fn begin(gate: &Arc<Gate>, done: &Arc<Done>) -> JoinHandle<()> {
        let number = gate.register();
        let (gate, done) = (gate.clone(), done.clone());
        thread::spawn(move || {
            let mut last = Turn::default();
            loop {
                match gate.pass(number, last) {
                    Pass::Run(turn) => {
                        last = turn;
                        done.turns.fetch_add(1, Ordering::SeqCst);
                    }
                    Pass::Leave => {
                        gate.left(number);
                        done.left.fetch_add(1, Ordering::SeqCst);
                    }
                    Pass::End => return,
                }
            }
        })
    }

    fn until(is: impl Fn() -> bool) {
        while !is() {
            thread::yield_now();
        }
    }

    #[test]
    fn the_last_to_wait_makes_the_call_and_nobody_after_the_gate_was_opened() {
        let (gate, done) = (Arc::<Gate>::default(), Arc::<Done>::default());
        let called = Arc::new(AtomicUsize::new(0));
        let call = |gate: &Gate| {
            let called = called.clone();
            gate.when_parked(move || {
                called.fetch_add(1, Ordering::SeqCst);
            });
        };
        // One that begins later is waited for as well.
        let late = gate.register();
        call(&gate);
        let threads = [begin(&gate, &done), begin(&gate, &done)];
        assert_eq!(called.load(Ordering::SeqCst), 0);
        let latest = {
            let gate = gate.clone();
            thread::spawn(move || gate.pass(late, Turn::default()))
        };
        until(|| called.load(Ordering::SeqCst) == 1);
        // At once where all wait.
        gate.wait();
        call(&gate);
        assert_eq!(called.load(Ordering::SeqCst), 2);
        gate.open();
        assert!(matches!(latest.join().unwrap(), Pass::Run(_)));
        until(|| done.turns.load(Ordering::SeqCst) == 2);
        // The third runs, so that nobody calls before the gate is opened.
        gate.when_parked(|| panic!("not all wait"));
        gate.open();
        until(|| done.turns.load(Ordering::SeqCst) == 4);
        gate.end();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(called.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_turn_is_had_once_by_each_and_a_closed_gate_holds_everybody() {
        const THREADS: usize = 4;
        let (gate, done) = (Arc::<Gate>::default(), Arc::<Done>::default());
        let threads: Vec<_> = (0..THREADS).map(|_| begin(&gate, &done)).collect();
        for round in 1..=3 {
            gate.wait();
            gate.open();
            until(|| done.turns.load(Ordering::SeqCst) >= THREADS * round);
            gate.close();
            gate.wait();
            assert_eq!(done.turns.load(Ordering::SeqCst), THREADS * round);
        }
        gate.end();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn one_that_is_put_aside_has_no_turn_until_it_is_let_in_and_then_the_present_one() {
        let (gate, done) = (Arc::<Gate>::default(), Arc::<Done>::default());
        let threads = [begin(&gate, &done), begin(&gate, &done)];
        gate.open();
        until(|| done.turns.load(Ordering::SeqCst) == 2);
        for round in 1..=3 {
            gate.put_aside(1);
            until(|| done.left.load(Ordering::SeqCst) == round);
            assert!(gate.is_out(1) && !gate.is_out(0));
            let before = done.turns.load(Ordering::SeqCst);
            // A pause counts it among those that stand still, and leaves it out.
            gate.close();
            gate.wait();
            gate.open();
            until(|| done.turns.load(Ordering::SeqCst) == before + 1);
            gate.let_in(1);
            until(|| done.turns.load(Ordering::SeqCst) == before + 2);
        }
        // While all are held as well.
        gate.close();
        gate.wait();
        gate.put_aside(1);
        until(|| done.left.load(Ordering::SeqCst) == 4);
        gate.wait();
        gate.end();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn nobody_waits_for_a_thread_that_is_gone_or_never_began() {
        let gate = Gate::default();
        gate.register();
        gate.gone();
        gate.wait();
        gate.register();
        gate.forget_last();
        gate.wait();
    }
}
