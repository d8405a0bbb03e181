//! Where vCPU threads wait while the VM does not run.

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

    /// A thread waits for a turn after `last`; `None` tells it to end.
    pub(super) fn pass(&self, last: Turn) -> Option<Turn> {
        let mut state = self.state();
        state.parked += 1;
        self.changed.notify_all();
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
        self.state().parked += 1;
        self.changed.notify_all();
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
