//! How long `busway device list` takes on a made-up host of 500 devices, and on one where 2000 processes have
//! 100 files open each: `cargo bench --bench device_list`.
//!
//! It prints, and never fails: the machine decides how fast it is.

#[path = "../vfio/host/tests/fake_host/mod.rs"]
mod fake_host;

use std::time::{Duration, Instant};

use busway::cli::device::{DeviceArgs, run_on};
use clap::{Args as _, FromArgMatches as _};
use fake_host::FakeHost;

const TIMES: usize = 50;

/// Twenty root ports with 24 virtual functions each and some drives, all with what a real one has.
fn description() -> String {
    let mut text = "kernel 6.12.0\niommu dmar0 cap=0x1\nremapping on\nuser 0\n".to_owned();
    for vendor in 0x1000..0x2000 {
        text += &format!("alias pci:v0000{vendor:04X}d*sv*sd*bc*sc*i* module_{vendor:x}\n");
    }
    text += "alias vfio_pci:v*d*sv*sd*bc*sc*i* vfio_pci\n";
    for port in 0..20_u32 {
        let group = port * 32;
        text += &format!(
            "device 0000:00:{port:02x}.0 8086:347a class=060400 driver=pcieport group={group} \
             link=16.0x16/16.0x16\n"
        );
        for index in 0..24_u32 {
            let (bus, slot) = (port + 1, index + 1);
            let group = group + index + 1;
            let address = format!("0000:{bus:02x}:{slot:02x}.0");
            let common = format!("group={group} numa=0 link=8.0x8/16.0x8 reset=flr,bus");
            if index % 4 == 0 {
                text += &format!(
                    "  device {address} 144d:a80a class=010802 driver=nvme {common} bars=16K/64\n    \
                     disk nvme/nvme{group}/nvme{group}n1 {group}\n"
                );
            } else {
                text += &format!(
                    "  device {address} 8086:154c class=020000 driver=iavf {common} \
                     bars=64K/64p,-,16K/64p\n    interface eth{group}\n"
                );
            }
        }
    }
    text
}

/// One disk, and 2000 processes of which each has 100 files open.
fn busy() -> String {
    let mut text = "user 0\ndevice 01:00.0 144d:a80a class=010802 driver=nvme group=1\n  \
                    disk nvme/nvme0/nvme0n1 259\n"
        .to_owned();
    for pid in 1000..3000 {
        text += &format!("process {pid} worker{}\n", " dev/null".repeat(100));
    }
    text += "process 4000 fio dev/nvme0n1\n";
    text
}

fn measure(of: &str, host: &FakeHost, words: &[&str]) {
    let command = DeviceArgs::augment_args(clap::Command::new("device").no_binary_name(true));
    let matches = command.try_get_matches_from(words);
    let args = matches.and_then(|matches| DeviceArgs::from_arg_matches(&matches));
    let args = args.expect("arguments that are right");
    let before = processor_time();
    let mut times: Vec<Duration> = (0..TIMES)
        .map(|_| {
            let mut out = Vec::new();
            let start = Instant::now();
            run_on(&args, &host.root, &mut host.kernel(), &mut out, Some(200))
                .expect("a list of the devices");
            start.elapsed()
        })
        .collect();
    let processor = (processor_time() - before) / u32::try_from(TIMES).expect("few times");
    times.sort();
    println!(
        "device {:<12} {of}, {TIMES} times: fastest {:.1?}, median {:.1?}, slowest {:.1?}; \
         processor time {processor:.1?} each",
        words.join(" "),
        times[0],
        times[TIMES / 2],
        times[TIMES - 1],
    );
}

/// What this process has used of all processors: it says more than a clock does on a busy machine.
fn processor_time() -> Duration {
    let text = std::fs::read_to_string("/proc/self/stat").expect("/proc/self/stat");
    // proc_pid_stat(5): utime and stime are 14 and 15, of which 3 is the first behind the name.
    let words = text.rsplit(')').next().expect("a name").split_whitespace();
    let ticks: u64 = words
        .skip(11)
        .take(2)
        .map(|word| word.parse::<u64>().expect("ticks"))
        .sum();
    // A tick is 10 ms to user space, whatever the kernel's own is.
    Duration::from_millis(ticks * 10)
}

fn main() {
    let host = FakeHost::described(&description());
    for words in [&["list"][..], &["list", "--tree"], &["list", "--json"]] {
        measure("500 devices", &host, words);
    }
    let host = FakeHost::described(&busy());
    measure("2000 processes", &host, &["list"]);
}
