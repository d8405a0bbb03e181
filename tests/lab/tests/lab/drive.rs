//! An NVMe drive, assigned: its data, its face, and what its I/O costs.

use anyhow::{Context, Result, ensure};
use busway_lab::{GuestKernel, Host, Lab};
use busway_pci::{capabilities, extended_capabilities};

use crate::assigned::{Interface, bound, give_back, guest, word};
use crate::{Proof, tell};

pub(crate) const PROOFS: &[Proof] = &[
    Proof::new(
        "drive_by_group_keeps_its_data_with_1_cpu_and_256_mib",
        |lab| {
            data(
                lab,
                &Case {
                    seed: 11,
                    kernel: GuestKernel::Stock,
                    cpus: 1,
                    memory_mib: 256,
                    interface: Interface::Group,
                    places: &["low"],
                },
            )
        },
    ),
    Proof::new(
        "drive_by_cdev_keeps_its_data_with_2_cpus_and_3_gib",
        |lab| {
            data(
                lab,
                &Case {
                    seed: 12,
                    kernel: GuestKernel::StockElf,
                    cpus: 2,
                    memory_mib: 3072,
                    interface: Interface::Cdev,
                    places: &["low"],
                },
            )
        },
    ),
    Proof::new(
        "drive_by_cdev_keeps_its_data_with_4_cpus_and_4_gib_on_both_sides_of_the_hole",
        |lab| {
            data(
                lab,
                &Case {
                    seed: 13,
                    kernel: GuestKernel::Stock,
                    cpus: 4,
                    memory_mib: 4096,
                    interface: Interface::Cdev,
                    places: &["high", "low"],
                },
            )
        },
    ),
    Proof::new("drive_by_group_reaches_both_sides_of_the_hole", |lab| {
        data(
            lab,
            &Case {
                seed: 14,
                kernel: GuestKernel::StockElf,
                cpus: 2,
                memory_mib: 4096,
                interface: Interface::Group,
                places: &["high"],
            },
        )
    }),
    Proof::new("drive_looks_in_the_guest_as_it_does_on_the_host", likeness),
    Proof::new(
        "drive_io_exits_to_user_space_never_and_uses_no_thread_of_ours",
        cost,
    ),
];

struct Case {
    seed: u32,
    kernel: GuestKernel,
    cpus: u32,
    memory_mib: u64,
    interface: Interface,
    places: &'static [&'static str],
}

/// The guest finds the drive by its serial number, writes a pattern over all of it from buffers at
/// each place, and reads it back; the host's own driver then reads the same.
fn data(lab: &mut Lab, case: &Case) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let mut script = String::from(
        "value serial \"$(cat /sys/class/nvme/nvme0/serial)\"\nvalue cpus \"$(nproc)\"\n\
         value memory \"$(awk '/^MemTotal/ { print $2 }' /proc/meminfo)\"\n",
    );
    for place in case.places {
        script += &format!(
            "value write_{place} \"$(lab-io write /dev/nvme0n1 {0} {place})\"\n\
             value verify_{place} \"$(lab-io verify /dev/nvme0n1 {0} {place})\"\n",
            case.seed
        );
    }
    let run = guest()?
        .kernel(case.kernel)
        .cpus(case.cpus)
        .memory_mib(case.memory_mib)
        .device(&address)
        .args(&case.interface.arguments())
        .script(&script);
    // Who boots a bzImage boots it as people do.
    let run = match case.kernel {
        GuestKernel::Stock => run.booted_in_full(),
        GuestKernel::StockElf => run,
    };
    let result = host.guest(&run)?.success()?;
    ensure!(
        result.value("serial")?.trim() == "NV0",
        "serial {}",
        result.value("serial")?
    );
    ensure!(
        result.value("cpus")? == case.cpus.to_string(),
        "{} CPUs",
        result.value("cpus")?
    );
    let seen: u64 = result.value("memory")?.parse()?;
    ensure!(
        seen > case.memory_mib * 1024 * 8 / 10,
        "the guest sees {seen} KiB"
    );
    for place in case.places {
        for step in ["write", "verify"] {
            let line = result.value(&format!("{step}_{place}"))?;
            ensure!(word(line, "bytes")? == (64 << 20).to_string(), "{line}");
            let buffer =
                u64::from_str_radix(word(line, "buffer_address")?.trim_start_matches("0x"), 16)?;
            ensure!((buffer >= 4 << 30) == (*place == "high"), "{line}");
        }
        tell!("{place}: {}", result.value(&format!("write_{place}"))?);
    }
    give_back(host, &address, "nvme")?;
    host.run(&format!(
        "udevadm settle; lab-io verify /dev/nvme0n1 {}",
        case.seed
    ))?;
    Ok(())
}

/// A function as sysfs shows it.
struct Face {
    config: Vec<u8>,
    /// Size and kind flags of BAR 0 to 5.
    bars: Vec<(u64, u64)>,
}

/// `linux/ioport.h`: I/O, memory, prefetchable, 64-bit.
const KIND: u64 = 0x100 | 0x200 | 0x2000 | 0x10_0000;

impl Face {
    fn parse(config: &str, resource: &str) -> Result<Self> {
        let digits: String = config.split_ascii_whitespace().collect();
        let config = (0..digits.len() / 2)
            .map(|at| {
                Ok(u8::from_str_radix(
                    digits.get(2 * at..2 * at + 2).context("odd")?,
                    16,
                )?)
            })
            .collect::<Result<Vec<u8>>>()?;
        ensure!(
            config.len() == 4096,
            "configuration space has {} bytes",
            config.len()
        );
        let number = |word: &str| u64::from_str_radix(word.trim_start_matches("0x"), 16);
        let mut bars = Vec::new();
        for line in resource.lines().take(6) {
            let words = line
                .split_ascii_whitespace()
                .map(number)
                .collect::<Result<Vec<_>, _>>()?;
            let [start, end, flags] = words[..] else {
                anyhow::bail!("resource line: {line}")
            };
            bars.push((if flags == 0 { 0 } else { end - start + 1 }, flags & KIND));
        }
        Ok(Self { config, bars })
    }

    /// Vendor and device; revision and class; subsystem.
    fn identity(&self) -> [&[u8]; 3] {
        [
            &self.config[..4],
            &self.config[8..12],
            &self.config[0x2c..0x30],
        ]
    }

    fn dword(&self, offset: u16) -> u32 {
        let at = usize::from(offset);
        u32::from_le_bytes([0, 1, 2, 3].map(|byte| self.config[at + byte]))
    }

    fn capabilities(&self) -> Vec<u8> {
        capabilities(&|offset| self.dword(offset))
            .iter()
            .map(|each| each.id)
            .collect()
    }

    fn extended_capabilities(&self) -> Vec<u16> {
        extended_capabilities(&|offset| self.dword(offset))
            .iter()
            .map(|each| each.id)
            .collect()
    }
}

/// Extended capabilities that a guest does not see: the list in `docs/design.md`.
const HIDDEN: &[u16] = &[
    0x00, 0x0e, 0x0f, 0x10, 0x11, 0x12, 0x13, 0x15, 0x17, 0x1b, 0x1d, 0x1e, 0x1f, 0x24,
];

fn host_face(host: &Host, address: &str) -> Result<Face> {
    let folder = format!("/sys/bus/pci/devices/{address}");
    let config = host.run(&format!("xxd -p {folder}/config"))?;
    Face::parse(&config, &host.run(&format!("cat {folder}/resource"))?)
}

fn likeness(lab: &mut Lab) -> Result<()> {
    for (id, find) in [
        ("nv0", "/sys/class/nvme/nvme0/device"),
        ("nic0", "/sys/class/net/eth0/device"),
    ] {
        let (host, address) = bound(lab, id)?;
        let expected = host_face(host, &address)?;
        let run = guest()?.device(&address).script(&format!(
            "hexdump -ve '16/1 \"%02x\" \"\\n\"' {find}/config | block config\n\
             cat {find}/resource | block resource\n"
        ));
        let result = host.guest(&run)?.success()?;
        let seen = Face::parse(result.block("config")?, result.block("resource")?)?;
        ensure!(
            seen.identity() == expected.identity(),
            "{id}: {:02x?}",
            seen.identity()
        );
        ensure!(
            seen.bars == expected.bars,
            "{id}: {:x?}, on the host {:x?}",
            seen.bars,
            expected.bars
        );
        let (ours, theirs) = (seen.capabilities(), expected.capabilities());
        ensure!(
            ours == theirs,
            "{id}: capabilities {ours:x?}, on the host {theirs:x?}"
        );
        let mut theirs = expected.extended_capabilities();
        theirs.retain(|id| !HIDDEN.contains(id));
        let ours = seen.extended_capabilities();
        ensure!(
            ours == theirs,
            "{id}: extended capabilities {ours:x?}, on the host {theirs:x?}"
        );
    }
    Ok(())
}

/// Reads between the guest's two marks, with KVM's counters and the threads' clocks at each.
fn cost(lab: &mut Lab) -> Result<()> {
    let (host, address) = bound(lab, "nv0")?;
    let fio = "fio --name=reads --filename=/dev/nvme0n1 --rw=randread --bs=4k --iodepth=16 \
               --ioengine=libaio --direct=1 --time_based --minimal";
    let run = guest()?.cpus(2).device(&address).programs().script(&format!(
        "{fio} --runtime=2 >/dev/null\nmark before 2\n{fio} --runtime=10 >/tmp/fio\nmark after 2\n\
         value reads \"$(cut -d ';' -f 6 /tmp/fio)\"\n"
    ));
    let result = host.guest(&run)?.success()?;
    // The sixth field of fio's terse output is the read total in KiB.
    let reads = result.value("reads")?.parse::<u64>()? / 4;
    let (before, after) = (&result.marks["before"], &result.marks["after"]);
    let grown = |counter| {
        after
            .since(before, counter)
            .context("KVM does not count that")
    };
    let (exits, mmio) = (grown("exits")?, grown("mmio_exits")?);
    tell!(
        "{reads} reads: {:.3} exits a read of any kind, {mmio} MMIO exits to user space",
        exits as f64 / reads as f64
    );
    ensure!(reads > 1000, "only {reads} reads");
    ensure!(
        mmio == 0,
        "{mmio} MMIO exits to user space in {reads} reads"
    );
    for thread in after.threads.iter().filter(|thread| !thread.is_vcpu()) {
        let earlier = before.threads.iter().find(|each| each.id == thread.id);
        let spent = earlier.map_or(0, |each| {
            thread.user + thread.system - each.user - each.system
        });
        // A mark itself is a line on the serial port, which may cost a tick at either end.
        ensure!(spent <= 2, "thread {} used {spent} ticks", thread.name);
    }
    Ok(())
}
