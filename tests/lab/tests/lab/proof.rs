//! Trials: what each proves, how, and in which tier it runs how long; and what a trial reports.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;

use anyhow::Result;
use busway_lab::Lab;

/// For whom trials run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tier {
    /// `scripts/test`: everything that has to hold for each change, with few rounds.
    Tests,
    /// `scripts/test soak`: what has rounds, with many of them.
    Soak,
}

impl Tier {
    /// The first in the tests, the second in a soak.
    pub(crate) fn of<T>(self, tests: T, soak: T) -> T {
        match self {
            Self::Tests => tests,
            Self::Soak => soak,
        }
    }
}

/// A trial: its name, which says what it proves, and how. It has its hosts for itself.
pub(crate) struct Proof {
    pub(crate) name: &'static str,
    prove: Prove,
    tiers: &'static [Tier],
}

enum Prove {
    Once(fn(&mut Lab) -> Result<()>),
    Rounds(fn(&mut Lab, Tier) -> Result<()>),
}

impl Proof {
    /// A trial of the tests.
    pub(crate) const fn new(name: &'static str, prove: fn(&mut Lab) -> Result<()>) -> Self {
        Self {
            name,
            prove: Prove::Once(prove),
            tiers: &[Tier::Tests],
        }
    }

    /// A trial that has more rounds in a soak than in the tests, and asks its tier how many.
    pub(crate) const fn rounds(
        name: &'static str,
        prove: fn(&mut Lab, Tier) -> Result<()>,
    ) -> Self {
        Self {
            name,
            prove: Prove::Rounds(prove),
            tiers: &[Tier::Tests, Tier::Soak],
        }
    }

    /// A trial that only a soak runs, where another one stands for it in the tests.
    pub(crate) const fn soak(name: &'static str, prove: fn(&mut Lab, Tier) -> Result<()>) -> Self {
        Self {
            name,
            prove: Prove::Rounds(prove),
            tiers: &[Tier::Soak],
        }
    }

    pub(crate) fn is_of(&self, tier: Tier) -> bool {
        self.tiers.contains(&tier)
    }

    /// Runs the trial once.
    pub(crate) fn prove(&self, lab: &mut Lab, tier: Tier) -> Result<()> {
        match self.prove {
            Prove::Once(prove) => prove(lab),
            Prove::Rounds(prove) => prove(lab, tier),
        }
    }
}

thread_local! {
    /// The trial that this thread runs.
    pub(crate) static TRIAL: Cell<&'static str> = const { Cell::new("") };
    /// What it has counted.
    static NUMBERS: RefCell<BTreeMap<String, u64>> = const { RefCell::new(BTreeMap::new()) };
}

/// Prints what a trial found, with its name.
macro_rules! tell {
    ($($words:tt)*) => {
        println!("{}: {}", crate::proof::TRIAL.get(), format_args!($($words)*))
    };
}
pub(crate) use tell;

/// Adds to one of the numbers of the trial that this thread runs: rounds, interrupts and the like.
pub(crate) fn count(what: &str, number: u64) {
    NUMBERS.with_borrow_mut(|numbers| *numbers.entry(what.to_owned()).or_default() += number);
}

/// The numbers since this was asked last.
pub(crate) fn take_numbers() -> BTreeMap<String, u64> {
    NUMBERS.take()
}
