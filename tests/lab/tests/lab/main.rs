//! Real guests with real devices, in the emulated host.
//!
//! The trials start longest first, by `tests/lab/times.txt`, and run in as many lanes as the machine bears.
//! Each has an emulated host of its own. What each cost is printed at the end and written to `target/times/trials.json`.

use std::process::ExitCode;

use anyhow::{Result, bail};
use busway_lab::budgets::Budgets;
use busway_lab::{Parts, Profile, build_busway, build_lab_io};
use clap::Parser;
use libtest_mimic::{Arguments, FormatSetting};

use proof::{Proof, Tier, count, tell};
use run::Run;

mod assigned;
mod bad_input;
#[path = "../../../kvm/bare.rs"]
mod bare;
mod bare_kernel;
mod bars;
mod clients;
mod cores;
mod cpus;
mod demo;
mod disk;
mod dma;
mod drive;
mod driver_domain;
mod emulated_host;
mod errors;
mod events;
mod firmware;
mod groups;
mod helper;
mod host_view;
mod hotplug;
mod interrupts;
mod lanes;
mod libvirt;
mod life;
mod mediated;
mod memory;
mod nic;
mod nodes;
#[path = "../../../kvm/opened.rs"]
mod opened;
mod package;
mod passt;
mod paused;
mod proof;
mod run;
mod segments;
mod slots;
mod small;
mod switched;
mod system;
mod tap;
mod tpm;
mod traced;
mod vhost;
mod vhost_user;
mod vhost_user_net;
mod virtio;
mod virtio_hotplug;
mod vsock;
mod walls;
mod want;
mod zones;
mod zoo;

/// All trials, by chapter.
const CHAPTERS: &[&[Proof]] = &[
    drive::PROOFS,
    bars::PROOFS,
    nic::PROOFS,
    virtio::PROOFS,
    tap::PROOFS,
    vsock::PROOFS,
    disk::PROOFS,
    vhost_user::PROOFS,
    vhost_user_net::PROOFS,
    switched::PROOFS,
    driver_domain::PROOFS,
    bad_input::PROOFS,
    life::PROOFS,
    libvirt::PROOFS,
    clients::PROOFS,
    helper::PROOFS,
    errors::PROOFS,
    events::PROOFS,
    cpus::PROOFS,
    cores::PROOFS,
    memory::PROOFS,
    nodes::PROOFS,
    zones::PROOFS,
    hotplug::PROOFS,
    mediated::PROOFS,
    virtio_hotplug::PROOFS,
    walls::PROOFS,
    traced::PROOFS,
    want::PROOFS,
    segments::PROOFS,
    slots::PROOFS,
    small::PROOFS,
    passt::PROOFS,
    paused::PROOFS,
    firmware::PROOFS,
    tpm::PROOFS,
    system::PROOFS,
    package::PROOFS,
    interrupts::PROOFS,
    groups::PROOFS,
    emulated_host::PROOFS,
    host_view::PROOFS,
    demo::PROOFS,
    dma::PROOFS,
    zoo::PROOFS,
];

/// What `cargo test` takes, and what only these trials do.
#[derive(Debug, Parser)]
struct Cli {
    #[command(flatten)]
    arguments: Arguments,
    /// More names: a trial runs if its name contains any of them.
    names: Vec<String>,
    /// The long rounds, of the trials that have some.
    #[arg(long)]
    soak: bool,
    /// It is an error if no trial has a given name.
    #[arg(long)]
    known: bool,
}

impl Cli {
    /// The names asked for, of which the harness itself knows one only.
    fn take_names(&mut self) -> Vec<String> {
        let names = self.arguments.filter.take().into_iter();
        names.chain(self.names.drain(..)).collect()
    }

    fn fits(&self, name: &str, asked: &str) -> bool {
        match self.arguments.exact {
            true => name == asked,
            false => name.contains(asked),
        }
    }
}

fn main() -> Result<ExitCode> {
    let mut cli = Cli::parse();
    let tier = if cli.soak { Tier::Soak } else { Tier::Tests };
    let names = cli.take_names();
    let budgets = Budgets::read()?;

    let all = CHAPTERS.iter().copied().flatten();
    let mut proofs: Vec<_> = all.clone().filter(|proof| proof.is_of(tier)).collect();
    if cli.known {
        let known = |asked: &str| proofs.iter().any(|proof| cli.fits(proof.name, asked));
        if let Some(unknown) = names.iter().find(|asked| !known(asked)) {
            bail!("no trial's name contains {unknown}: `scripts/lab test --list` lists them");
        }
    }
    proofs
        .retain(|proof| names.is_empty() || names.iter().any(|asked| cli.fits(proof.name, asked)));
    budgets.sort(&mut proofs, |proof| proof.name);

    let mut arguments = cli.arguments;
    if arguments.list && arguments.format != Some(FormatSetting::Terse) {
        for proof in proofs {
            // The budgets are those of few rounds.
            let budget = budgets.of(proof.name).filter(|_| tier == Tier::Tests);
            let budget = budget.map_or("?".to_owned(), |seconds| seconds.to_string());
            println!("{budget:>4} s  {}", proof.name);
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (programs, has) = match arguments.list || proofs.is_empty() {
        true => (Vec::new(), [true; 2]),
        false => {
            let parts = Parts::prepare()?;
            let has = [parts.backports.is_some(), parts.libvirt.is_some()];
            (vec![build_busway(Profile::Lab)?, build_lab_io()?], has)
        }
    };
    let at_once = *arguments.test_threads.get_or_insert_with(lanes::number);
    let run = Run::new(tier, budgets, programs, has, at_once);
    let trials = proofs.into_iter().map(|proof| run.trial(proof));
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    let tests: Vec<_> = all
        .filter(|proof| proof.is_of(Tier::Tests))
        .map(|proof| proof.name)
        .collect();
    run.end(&tests)?;
    Ok(conclusion.exit_code())
}
