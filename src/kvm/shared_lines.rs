//! Lines of the interrupt controller that several devices of this process hold up: one is up for as long as
//! any of them wants it. KVM keeps one level for all of a process's calls (KVM API, KVM_IRQ_LINE), and those
//! of irqfds apart from it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use busway_pci::InterruptLevel;

use super::irq::{IrqRouter, LevelLine};

/// How many pins hold each GSI up.
type Holders = Arc<Mutex<BTreeMap<u32, usize>>>;

/// Makes pins. Those that are to share lines come from one of these.
#[derive(Clone, Debug)]
pub struct SharedLines {
    router: IrqRouter,
    holders: Holders,
}

impl IrqRouter {
    /// Lines that nobody holds up yet.
    #[must_use]
    pub fn shared_lines(&self) -> SharedLines {
        SharedLines {
            router: self.clone(),
            holders: Holders::default(),
        }
    }
}

impl SharedLines {
    /// A pin that leads to `gsi`, let down.
    #[must_use]
    pub fn pin(&self, gsi: u32) -> SharedPin {
        SharedPin {
            line: self.router.level_line(gsi),
            gsi,
            holders: self.holders.clone(),
            up: AtomicBool::new(false),
        }
    }
}

/// A pin. Dropping it lets it down.
#[derive(Debug)]
pub struct SharedPin {
    line: LevelLine,
    gsi: u32,
    holders: Holders,
    /// Changed under the lock of `holders`.
    up: AtomicBool,
}

impl InterruptLevel for SharedPin {
    fn set(&self, asserted: bool) {
        // Most calls change nothing.
        if self.up.load(Ordering::Relaxed) == asserted {
            return;
        }
        // The kernel is called with the lock held, so that the last call is that of the last change.
        let mut holders = self.holders.lock().unwrap_or_else(PoisonError::into_inner);
        if self.up.swap(asserted, Ordering::Relaxed) == asserted {
            return;
        }
        let count = holders.entry(self.gsi).or_default();
        let before = *count;
        *count = match asserted {
            true => before.saturating_add(1),
            false => before.saturating_sub(1),
        };
        if (before == 0) != (*count == 0) {
            self.line.set(asserted);
        }
    }
}

impl Drop for SharedPin {
    fn drop(&mut self) {
        self.set(false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::Vm;

    /// How many pins hold a line up.
    fn holders(lines: &SharedLines, gsi: u32) -> usize {
        let holders = lines.holders.lock().unwrap();
        holders.get(&gsi).copied().unwrap_or_default()
    }

    #[test]
    fn a_line_is_up_until_the_last_of_its_pins_is_let_down() {
        let Ok(vm) = Vm::new().inspect_err(|error| eprintln!("skipped: {error}")) else {
            return;
        };
        let Ok(router) = vm
            .irq_router()
            .inspect_err(|error| eprintln!("skipped: {error}"))
        else {
            return;
        };
        let lines = router.shared_lines();
        let (one, two, other) = (lines.pin(17), lines.pin(17), lines.pin(18));
        for pin in [&one, &two, &one] {
            pin.set(true);
        }
        assert_eq!([holders(&lines, 17), holders(&lines, 18)], [2, 0]);
        other.set(true);
        one.set(false);
        one.set(false);
        assert_eq!([holders(&lines, 17), holders(&lines, 18)], [1, 1]);
        drop(two);
        assert_eq!([holders(&lines, 17), holders(&lines, 18)], [0, 1]);
    }
}
