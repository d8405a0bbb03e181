//! Real guests with real devices, in the emulated host.
//!
//! The trials run one after another, those that want the same host in a row.

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use busway_lab::{Lab, Profile, build_busway, build_lab_io, is_stall};
use libtest_mimic::{Arguments, Failed, Trial};

mod assigned;
mod bad_input;
#[path = "../../../kvm/bare.rs"]
mod bare;
mod bare_kernel;
mod bars;
mod demo;
mod dma;
mod drive;
mod emulated_host;
mod errors;
mod events;
mod groups;
mod helper;
mod host_view;
mod interrupts;
mod life;
mod nic;
mod virtio;
mod zoo;

/// A trial: what it proves, and how. A host that it leaves unwell is replaced if it fails.
type Proof = (&'static str, fn(&mut Lab) -> Result<()>);

/// How often a trial is begun that ends in a stall or a triple fault or loses its host, which the emulator is known
/// for: see `docs/lab.md`. Every other failure is final at once.
const ATTEMPTS: u32 = 3;

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let programs = match arguments.list {
        true => Vec::new(),
        false => vec![build_busway(Profile::Lab)?, build_lab_io()?],
    };
    let lab = Arc::new(Mutex::new(Lab::new(programs)));
    let proofs = [
        drive::PROOFS,
        bars::PROOFS,
        nic::PROOFS,
        virtio::PROOFS,
        bad_input::PROOFS,
        life::PROOFS,
        helper::PROOFS,
        errors::PROOFS,
        events::PROOFS,
        interrupts::PROOFS,
        groups::PROOFS,
        emulated_host::PROOFS,
        host_view::PROOFS,
        demo::PROOFS,
        dma::PROOFS,
    ];
    let trials = proofs
        .into_iter()
        .flatten()
        .chain(zoo::PROOFS)
        .map(|proof| match on_request(proof.0) {
            Some(why) => trial(proof, &lab).with_ignored_flag(true).with_kind(why),
            None => trial(proof, &lab),
        })
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    lab.lock().unwrap_or_else(PoisonError::into_inner).stop();
    Ok(conclusion.exit_code())
}

fn trial(&(name, prove): &Proof, lab: &Arc<Mutex<Lab>>) -> Trial {
    let lab = Arc::clone(lab);
    let reason = cannot();
    Trial::test(name, move || {
        let mut lab = lab.lock().unwrap_or_else(PoisonError::into_inner);
        for attempt in 1.. {
            let Err(error) = prove(&mut lab) else { break };
            lab.stop();
            if attempt == ATTEMPTS || !is_stall(&error) {
                return Err(Failed::from(format!("{error:#}")));
            }
            eprintln!("{name}: it may be the emulator, attempt {attempt} of {ATTEMPTS}: {error:#}");
        }
        Ok(())
    })
    .with_ignored_flag(reason.is_some())
    .with_kind(reason.unwrap_or_default())
}

/// Trials that run with `--ignored` alone, by the beginnings of their names, and why.
const ON_REQUEST: &[(&str, &str)] = &[
    ("zoo_drivers_leave", "long: 150 s"),
    ("interrupts_to_the_number_of_100_000", "long: 150 s"),
    ("interrupts_are_neither", ONE_TOO_MANY),
    ("helper_makes_virtual_functions", "long: 100 s"),
    ("helper_binds_at_boot", "long: 70 s"),
    ("groups_two", "long: 80 s"),
    ("groups_no_trace", "long: 180 s"),
    ("groups_a_drive", "long: 120 s"),
    ("zoo_in_one_guest", "long: 110 s"),
    ("dma_devices_reach_each_other_by_dma_buf", "builds a kernel"),
];

/// What is said of a trial that needs the count of `ivshmem-doorbell`'s interrupts to be exact.
const ONE_TOO_MANY: &str = "the emulator can deliver an interrupt twice";

/// Why a trial runs on request only, if it does.
fn on_request(name: &str) -> Option<&'static str> {
    let listed = ON_REQUEST
        .iter()
        .find(|(begins, _)| name.starts_with(begins));
    listed.map(|(_, why)| *why)
}

/// Why this machine cannot run the lab, if it cannot.
fn cannot() -> Option<&'static str> {
    (!cfg!(target_arch = "x86_64")).then_some("the emulated host is an x86_64 one")
}
