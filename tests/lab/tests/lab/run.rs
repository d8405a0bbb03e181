//! Runs trials, and keeps the account of what each came to.

use std::any::Any;
use std::env;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Result, anyhow};
use busway_lab::budgets::Budgets;
use busway_lab::spent::Meter;
use busway_lab::trials::{TrialRun, Trials, first_line};
use busway_lab::{Lab, may_be_the_emulators, with_guests_left};
use libtest_mimic::{Failed, Trial};

use crate::proof::{Proof, TRIAL, Tier, take_numbers, tell};

/// How often a trial is begun that ends in a stall or a triple fault or loses its host, which the emulator is known
/// for: see `docs/lab.md`. Every other failure is final at once.
const ATTEMPTS: usize = 4;

/// What all trials of a run share.
pub(crate) struct Run {
    tier: Tier,
    /// What each host has in its `/usr/local/bin`.
    programs: Vec<PathBuf>,
    /// The kernel of backports could be made.
    has_backports: bool,
    /// So could libvirt.
    has_libvirt: bool,
    budgets: Budgets,
    began: Instant,
    trials: Mutex<Trials>,
}

impl Run {
    pub(crate) fn new(
        tier: Tier,
        budgets: Budgets,
        programs: Vec<PathBuf>,
        [has_backports, has_libvirt]: [bool; 2],
        at_once: usize,
    ) -> Arc<Self> {
        Arc::new(Self {
            tier,
            programs,
            has_backports,
            has_libvirt,
            budgets,
            began: Instant::now(),
            trials: Mutex::new(Trials {
                soak: tier == Tier::Soak,
                lanes: at_once,
                ..Trials::default()
            }),
        })
    }

    fn trials(&self) -> MutexGuard<'_, Trials> {
        self.trials.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The trial of a proof.
    pub(crate) fn trial(self: &Arc<Self>, proof: &'static Proof) -> Trial {
        let run = Arc::clone(self);
        let reason = self.cannot(proof.name);
        Trial::test(proof.name, move || run.prove(proof))
            .with_ignored_flag(reason.is_some())
            .with_kind(reason.unwrap_or_default())
    }

    /// Why a trial cannot run, if it cannot.
    fn cannot(&self, name: &str) -> Option<&'static str> {
        if !cfg!(target_arch = "x86_64") {
            return Some("the emulated host is an x86_64 one");
        }
        if !self.has_libvirt && name.starts_with("libvirt_") {
            return Some("the set-up could not make libvirt");
        }
        (!self.has_backports && name.contains("_by_dma_buf"))
            .then_some("the set-up could not make the backports kernel")
    }

    fn prove(&self, proof: &Proof) -> Result<(), Failed> {
        TRIAL.set(proof.name);
        let began = Instant::now();
        let meter = Meter::start();
        let entered = meter.enter();
        let mut lab = Lab::new(self.programs.clone());
        let mut begun_anew = Vec::new();
        let (outcome, last) = loop {
            take_numbers();
            let began = Instant::now();
            let outcome = attempt(proof, &mut lab, self.tier);
            match &outcome {
                Err(error) if begun_anew.len() + 1 < ATTEMPTS && may_be_the_emulators(error) => {
                    let reason = format!("{error:#}");
                    begun_anew.push(first_line(&reason));
                    tell!(
                        "it may be the emulator, so for the {}. time: {reason}",
                        begun_anew.len() + 1
                    );
                    lab.stop();
                }
                _ => break (outcome, began.elapsed().as_secs_f64()),
            }
        };
        drop(lab);
        drop(entered);
        let outcome = outcome.map_err(|error| format!("{error:#}"));
        self.note(TrialRun {
            name: proof.name.to_owned(),
            passed: outcome.is_ok(),
            failure: outcome.as_ref().err().map(|text| first_line(text)),
            seconds: began.elapsed().as_secs_f64(),
            last,
            // The budgets are those of few rounds.
            budget: (self.tier == Tier::Tests)
                .then(|| self.budgets.of(proof.name))
                .flatten(),
            spent: meter.stop(),
            begun_anew,
            numbers: take_numbers(),
        });
        outcome.map_err(Failed::from)
    }

    /// Adds a trial that has ended. The file is written each time, so that a run that is broken off leaves it.
    fn note(&self, trial: TrialRun) {
        let mut trials = self.trials();
        trials.trials.push(trial);
        trials.seconds = self.began.elapsed().as_secs_f64();
        if let Err(error) = trials.write() {
            eprintln!("lab: {error:#}");
        }
    }

    /// Prints the account. `all` are the names of the tests' trials that there are.
    pub(crate) fn end(&self, all: &[&str]) -> Result<()> {
        let trials = self.trials();
        if trials.trials.is_empty() {
            return Ok(());
        }
        println!("{}\n{}", trials.table(), trials.begun_anew());
        if trials.soak {
            println!("{}", trials.numbers());
            return Ok(());
        }
        let overwrite = env::var("TIMES").is_ok_and(|value| value == "overwrite");
        if overwrite {
            let passed = trials.trials.iter().filter(|trial| trial.passed);
            let took: Vec<_> = passed
                .map(|trial| (trial.name.as_str(), trial.last))
                .collect();
            return self.budgets.with(&took, all).write();
        }
        print!("{}", trials.over_budget());
        for name in self.budgets.gone(all) {
            println!("tests/lab/times.txt has a row for {name}, which is no trial");
        }
        Ok(())
    }
}

/// One attempt; a panic is a failure as every other.
fn attempt(proof: &Proof, lab: &mut Lab, tier: Tier) -> Result<()> {
    let outcome = catch_unwind(AssertUnwindSafe(|| proof.prove(lab, tier)))
        .unwrap_or_else(|panic| Err(anyhow!("it panicked: {}", words(panic.as_ref()))));
    with_guests_left(outcome)
}

fn words(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("without words")
}
