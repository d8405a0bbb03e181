//! Real guests with real devices, in the emulated host.
//!
//! The trials run in as many lanes as the machine bears, each lane with one emulated host at a time; those that want
//! the same host stand in a row.

use std::cell::Cell;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use busway_lab::{Lab, Profile, build_busway, build_lab_io, may_be_the_emulators};
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
const ATTEMPTS: u32 = 4;

fn main() -> Result<ExitCode> {
    let mut arguments = Arguments::from_args();
    arguments.test_threads.get_or_insert_with(lanes);
    let programs = match arguments.list {
        true => Vec::new(),
        false => vec![build_busway(Profile::Lab)?, build_lab_io()?],
    };
    let labs = Arc::new(Labs {
        programs,
        idle: Mutex::default(),
        took: Mutex::default(),
    });
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
        zoo::PROOFS,
    ];
    let trials = proofs
        .into_iter()
        .enumerate()
        .flat_map(|(chapter, proofs)| proofs.iter().map(move |proof| (chapter, proof)))
        .map(|(chapter, proof)| trial(chapter, proof, &labs))
        .collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    labs.idle().clear();
    labs.tell_longest();
    Ok(conclusion.exit_code())
}

/// How many trials run at once. A host has two processors and is idle for half of the time; the largest takes 8 GiB.
fn lanes() -> usize {
    const MOST: usize = 4;
    const KIB: u64 = 10 << 20;
    let available = fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text
            .lines()
            .find_map(|line| line.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    });
    let memory = usize::try_from(available.unwrap_or_default() / KIB).unwrap_or(MOST);
    let processors = thread::available_parallelism().map_or(1, usize::from);
    memory.min(processors).clamp(1, MOST)
}

/// The lanes' labs, of which a trial takes one for itself, each with the chapter of the trial before.
struct Labs {
    programs: Vec<PathBuf>,
    idle: Mutex<Vec<(usize, Lab)>>,
    /// How long each trial took that has ended.
    took: Mutex<Vec<(Duration, &'static str)>>,
}

impl Labs {
    fn idle(&self) -> MutexGuard<'_, Vec<(usize, Lab)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn took(&self) -> MutexGuard<'_, Vec<(Duration, &'static str)>> {
        self.took.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says where the time went: whoever makes the trials faster begins there.
    fn tell_longest(&self) {
        let mut took = self.took();
        if took.len() < 2 {
            return;
        }
        took.sort_unstable_by(|one, other| other.cmp(one));
        let whole: Duration = took.iter().map(|(time, _)| *time).sum();
        println!(
            "{} trials took {} s one by one; the longest, booting their hosts included:",
            took.len(),
            whole.as_secs()
        );
        for (time, name) in took.iter().take(15) {
            println!("{:>6} s  {name}", time.as_secs());
        }
    }

    /// A lab whose host, if it has one, only trials of this chapter have used: what those of another leave behind is
    /// nobody's business.
    fn take(&self, chapter: usize) -> Lab {
        let mut idle = self.idle();
        let own = idle.iter().position(|(last, _)| *last == chapter);
        if let Some(own) = own {
            return idle.swap_remove(own).1;
        }
        let other = idle.pop();
        drop(idle);
        other.map_or_else(
            || Lab::new(self.programs.clone()),
            |(_, mut lab)| {
                lab.stop();
                lab
            },
        )
    }
}

thread_local! {
    /// The trial that this thread runs.
    static TRIAL: Cell<&'static str> = const { Cell::new("") };
}

/// Prints what a trial found, with its name.
macro_rules! tell {
    ($($words:tt)*) => {
        println!("{}: {}", crate::TRIAL.get(), format_args!($($words)*))
    };
}
use tell;

/// A trial of one chapter, which is a module's.
fn trial(chapter: usize, &(name, prove): &Proof, labs: &Arc<Labs>) -> Trial {
    let labs = Arc::clone(labs);
    let reason = cannot(name);
    Trial::test(name, move || {
        TRIAL.set(name);
        let started = Instant::now();
        let mut lab = labs.take(chapter);
        let mut outcome = prove(&mut lab);
        for attempt in 2..=ATTEMPTS {
            let Err(error) = &outcome else { break };
            if !may_be_the_emulators(error) {
                break;
            }
            tell!("it may be the emulator, so for the {attempt}. time: {error:#}");
            lab.stop();
            outcome = prove(&mut lab);
        }
        if outcome.is_err() {
            lab.stop();
        }
        labs.idle().push((chapter, lab));
        labs.took().push((started.elapsed(), name));
        outcome.map_err(|error| Failed::from(format!("{error:#}")))
    })
    .with_ignored_flag(reason.is_some())
    .with_kind(reason.unwrap_or_default())
}

/// Why this machine cannot run a trial, if it cannot. `scripts/test` says of the backports kernel, whose source is
/// Debian's newest, that it could not be built.
fn cannot(name: &str) -> Option<&'static str> {
    if !cfg!(target_arch = "x86_64") {
        return Some("the emulated host is an x86_64 one");
    }
    let without = env::var_os("BUSWAY_LAB_WITHOUT_BACKPORTS").is_some();
    (without && name.contains("_by_dma_buf")).then_some("the backports kernel could not be built")
}
