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

#[derive(Debug, Default)]
struct State {
    goal: Goal,
    last: Turn,
    /// Threads that wait here or are gone.
    parked: usize,
    /// What is called when so many threads wait or are gone.
    call: Option<(usize, Call)>,
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
    /// Lets everybody run, also those that gave up their last turn by themselves.
    pub(super) fn open(&self) {
        let mut state = self.state();
        state.last.0 += 1;
        state.goal = Goal::Run(state.last);
        state.call = None;
        self.changed.notify_all();
    }

    /// Asks everybody to wait. They have to be kicked after this, and before [`Self::wait_for`].
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

    /// Waits until `count` threads wait or are gone.
    pub(super) fn wait_for(&self, count: usize) {
        let state = self.state();
        let _done = self
            .changed
            .wait_while(state, |state| state.parked < count)
            .unwrap_or_else(PoisonError::into_inner);
    }

    /// Has `then` called when `count` threads wait or are gone, on the thread that is the last to come,
    /// or at once where they all have. It is never called where the gate opens before that.
    pub(super) fn when_parked(&self, count: usize, then: impl FnOnce() + Send + 'static) {
        let mut state = self.state();
        state.call = Some((count, Call(Box::new(then))));
        drop(self.call(state));
    }

    /// Calls what waits for so many threads. The lock is not held meanwhile.
    fn call<'a>(&'a self, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        let parked = state.parked;
        match state.call.take_if(|(count, _)| *count <= parked) {
            Some((_, Call(then))) => {
                drop(state);
                then();
                self.state()
            }
            None => state,
        }
    }

    /// A thread waits for a turn after `last`; `None` tells it to end.
    pub(super) fn pass(&self, last: Turn) -> Option<Turn> {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
        let state = self.call(state);
        let mut state = self
            .changed
            .wait_while(state, |state| {
                matches!(state.goal, Goal::Wait) || state.goal == Goal::Run(last)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match state.goal {
            Goal::Run(turn) => {
                state.parked = state.parked.saturating_sub(1);
                Some(turn)
            }
            Goal::Wait | Goal::End => None,
        }
    }

    /// Whether `turn` is still on.
    pub(super) fn is_on(&self, turn: Turn) -> bool {
        self.state().goal == Goal::Run(turn)
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
    use std::thread;

    #[test]
    fn the_last_to_wait_makes_the_call_and_nobody_after_the_gate_was_opened() {
        let gate = Arc::new(Gate::default());
        let (called, turns) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let call = |gate: &Gate| {
            let called = called.clone();
            gate.when_parked(2, move || {
                called.fetch_add(1, Ordering::SeqCst);
            });
        };
        call(&gate);
        let waiting: Vec<_> = (0..2)
            .map(|_| {
                let (gate, turns) = (gate.clone(), turns.clone());
                thread::spawn(move || {
                    let turn = gate.pass(Turn::default());
                    turns.fetch_add(1, Ordering::SeqCst);
                    gate.pass(turn.unwrap());
                })
            })
            .collect();
        gate.wait_for(2);
        while called.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        // At once where all wait.
        call(&gate);
        assert_eq!(called.load(Ordering::SeqCst), 2);
        gate.when_parked(3, || panic!("nobody else comes before the gate is opened"));
        gate.open();
        while turns.load(Ordering::SeqCst) < 2 {
            thread::yield_now();
        }
        gate.wait_for(2);
        gate.end();
        for thread in waiting {
            thread.join().unwrap();
        }
        assert_eq!(called.load(Ordering::SeqCst), 2);
    }

    #[test]
    fn a_turn_is_had_once_by_each_and_a_closed_gate_holds_everybody() {
        const THREADS: usize = 4;
        let (gate, turns) = (Arc::new(Gate::default()), Arc::new(AtomicUsize::new(0)));
        let threads: Vec<_> = (0..THREADS)
            .map(|_| {
                let (gate, turns) = (gate.clone(), turns.clone());
                thread::spawn(move || {
                    let mut turn = Turn::default();
                    while let Some(next) = gate.pass(turn) {
                        turn = next;
                        turns.fetch_add(1, Ordering::SeqCst);
                    }
                })
            })
            .collect();
        for round in 1..=3 {
            gate.wait_for(THREADS);
            gate.open();
            while turns.load(Ordering::SeqCst) < THREADS * round {
                thread::yield_now();
            }
            gate.close();
            gate.wait_for(THREADS);
            assert_eq!(turns.load(Ordering::SeqCst), THREADS * round);
        }
        gate.end();
        for thread in threads {
            thread.join().unwrap();
        }
    }

    #[test]
    fn nobody_waits_for_a_thread_that_is_gone() {
        let gate = Gate::default();
        gate.gone();
        gate.wait_for(1);
    }
}
