//! Real guests with real devices, in the emulated host.
//!
//! The trials run one after another, those that want the same host in a row.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use busway_lab::Lab;
use libtest_mimic::{Arguments, Failed, Trial};

mod emulated_host;

/// A trial: what it proves, and how. A host that it leaves unwell is replaced if it fails.
type Proof = (&'static str, fn(&mut Lab) -> Result<()>);

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let lab = Arc::new(Mutex::new(Lab::new(None)));
    let trials = emulated_host::PROOFS
        .iter()
        .map(|proof| trial(proof, &lab))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    lab.lock().unwrap_or_else(PoisonError::into_inner).stop();
    conclusion.exit_code()
}

fn trial(&(name, prove): &Proof, lab: &Arc<Mutex<Lab>>) -> Trial {
    let lab = Arc::clone(lab);
    let reason = cannot();
    Trial::test(name, move || {
        let mut lab = lab.lock().unwrap_or_else(PoisonError::into_inner);
        prove(&mut lab).map_err(|error| {
            lab.stop();
            Failed::from(format!("{error:#}"))
        })
    })
    .with_ignored_flag(reason.is_some())
    .with_kind(reason.unwrap_or_default())
}

/// Why this machine cannot run the lab, if it cannot.
fn cannot() -> Option<&'static str> {
    (!cfg!(target_arch = "x86_64")).then_some("the emulated host is an x86_64 one")
}
