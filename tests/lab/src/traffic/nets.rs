//! NICs: a tap that Busway or the host's kernel (vhost-net) serves, the same by QEMU, passt by vhost-user, and a physical NIC
//! passed through, whose wire leads to another NIC of the host's.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use busway_lab::{
    Device, GuestResult, GuestRun, Host, HostConfig, Job, Kernel, Profile, Vmm, build_static,
};
use clap::Args;

use super::result::{Reading, Results, SetUp, Workload};
use super::{Bench, IoArgs, Turn, interrupts, iperf, marked, table};

/// NICs by virtio-net, and one passed through, on one host in turns.
#[derive(Debug, Args)]
pub(crate) struct NetsArgs {
    #[command(flatten)]
    io: IoArgs,
}

/// The set-up by which all are divided.
const REFERENCE: &str = "qemu-vhost";

const SET_UPS: &[SetUp] = &[
    SetUp {
        name: "busway-tap",
        title: "Busway: tap",
        counterpart: Some("qemu-tap"),
    },
    SetUp {
        name: "busway-vhost",
        title: "Busway: vhost-net",
        counterpart: Some("qemu-vhost"),
    },
    SetUp {
        name: "busway-passt",
        title: "Busway: vhost-user, passt",
        counterpart: None,
    },
    SetUp {
        name: "busway-assigned",
        title: "Busway: passed through",
        counterpart: Some("qemu-assigned"),
    },
    SetUp {
        name: REFERENCE,
        title: "QEMU: vhost-net",
        counterpart: None,
    },
    SetUp {
        name: "qemu-tap",
        title: "QEMU: tap",
        counterpart: None,
    },
    SetUp {
        name: "qemu-assigned",
        title: "QEMU: passed through",
        counterpart: None,
    },
];

/// What is measured only with `--all`.
const RARE: &[&str] = &["qemu-tap", "qemu-assigned"];

/// Both ends of what a guest's NIC leads to.
#[derive(Clone, Copy)]
struct Ends {
    /// The guest's address, with the length of the network's part.
    guest: &'static str,
    /// Whom it asks.
    server: &'static str,
    /// Where the host listens for that.
    listening: &'static str,
    /// What begins the host's commands for that.
    place: &'static str,
}

/// A tap of the host's.
const BY_TAP: Ends = Ends {
    guest: "10.5.0.2/24",
    server: "10.5.0.1",
    listening: "10.5.0.1",
    place: "",
};
/// The other end of the NICs' wire: a namespace of the host's.
const BY_WIRE: Ends = Ends {
    guest: "10.6.0.2/24",
    server: "10.6.0.1",
    listening: "10.6.0.1",
    place: "ip netns exec far ",
};
/// passt, by whose gateway the guest reaches the host's own addresses. Both are given to it: it would take the tap's else.
/// passt(1), `--gateway`
const BY_PASST: Ends = Ends {
    guest: "169.254.2.1/16",
    server: "169.254.2.2",
    listening: "127.0.0.1",
    place: "",
};
/// Where round trips are answered.
const PORT: u16 = 7;

const REPORT: &str = "/tmp/report";

/// What is done, in this order: each has its name among a guest's marks and values.
const TRIPS: &str = "round-trips";
const STREAMS: [(&str, &str, &str); 2] = [
    ("sent", "one TCP stream out of the guest", ""),
    ("received", "one TCP stream into the guest", "-R"),
];

/// Measures, and prints a table.
pub(crate) fn run(arguments: &NetsArgs) -> Result<()> {
    let io = &arguments.io;
    let program = build_static("busway-lab", "lab-net", Profile::Lab)?;
    let mut results = Results {
        workloads: Vec::new(),
        set_ups: io.chosen(SET_UPS, RARE, REFERENCE),
        reference: REFERENCE,
        readings: Vec::new(),
    };
    let bench = Bench {
        what: "NICs",
        arguments: io,
        cpus: 1,
        host: HostConfig::new(Kernel::Iommufd)
            .cpus(3)
            .device(Device::e1000e("wire0").wired())
            .device(Device::e1000e("wire1").wired()),
        prepare: &|host| prepare(host, &program),
        measure: &|turn, set_up| measure(turn, set_up, &program),
    };
    let workload = |name: &str, title: &str, operation, decimals| Workload {
        name: name.to_owned(),
        title: title.to_owned(),
        operation,
        decimals,
    };
    let mut workloads = vec![workload(
        TRIPS,
        "round trips of a byte over TCP, one at a time",
        "trip",
        0,
    )];
    workloads.extend(STREAMS.map(|(name, title, _)| workload(name, title, "megabyte", 1)));
    bench.run(workloads, &mut results, "A guest's NIC")?;
    print!("{}", table::render(&results));
    Ok(())
}

/// A tap whose other end is the host, and a namespace that has the second of the wired NICs.
fn prepare(host: &Host, program: &Path) -> Result<()> {
    host.install(program)?;
    let far = host.address("wire1")?;
    let (wire, tap) = (BY_WIRE.server, BY_TAP.server);
    host.run(&format!(
        "set -e; modprobe vhost_net; ip netns add far; ip netns exec far ip link set lo up\n\
         ip link set $(ls /sys/bus/pci/devices/{far}/net) netns far name far0\n\
         ip netns exec far sh -ec 'ip addr add {wire}/24 dev far0; ip link set far0 up'\n\
         ip tuntap add bench0 mode tap vnet_hdr; ip addr add {tap}/24 dev bench0; ip link set bench0 up"
    ))
    .map(drop)
}

fn measure(turn: &Turn<'_>, set_up: &SetUp, program: &Path) -> Result<Vec<Reading>> {
    let (vmm, kind) = set_up
        .name
        .split_once('-')
        .context("a set-up has two words")?;
    let vmm = if vmm == "busway" {
        Vmm::Busway
    } else {
        Vmm::Qemu
    };
    let run = turn.guest(vmm).file("bin/lab-net", program);
    match kind {
        "assigned" => by_wire(turn, set_up, run),
        "passt" => by_passt(turn, set_up, run),
        _ => {
            let vhost = if kind == "vhost" { "on" } else { "off" };
            let run = match vmm {
                Vmm::Busway => run.args(&["--net", &format!("tap=bench0,vhost={vhost}")]),
                Vmm::Qemu => run.args(&[
                    "-netdev",
                    &format!("tap,id=net,ifname=bench0,script=no,downscript=no,vhost={vhost}"),
                    "-device",
                    "virtio-net-pci,netdev=net",
                ]),
            };
            in_a_guest(turn, set_up, run, BY_TAP)
        }
    }
}

fn by_wire(turn: &Turn<'_>, set_up: &SetUp, run: GuestRun) -> Result<Vec<Reading>> {
    let address = turn.host.address("wire0")?;
    turn.host.run(&format!("busway device bind {address}"))?;
    let readings = in_a_guest(turn, set_up, run.device(&address), BY_WIRE);
    // It goes back to the host in either case, for the turn may begin anew.
    turn.host.run(&format!("busway device unbind {address}"))?;
    readings
}

fn by_passt(turn: &Turn<'_>, set_up: &SetUp, run: GuestRun) -> Result<Vec<Reading>> {
    let socket = "/run/bench.sock";
    let _passt = turn.host.spawn(&format!(
        "rm -f {socket}; ip link set lo up; exec passt --foreground --vhost-user --socket {socket} --tcp-ports none \
         --udp-ports none --address 169.254.2.1 --netmask 255.255.0.0 --gateway {}",
        BY_PASST.server
    ))?;
    turn.host.run(&format!(
        "for each in $(seq 100); do ! ss -Hlx | grep -q '{socket} ' || exit 0; sleep 0.1; done; exit 1"
    ))?;
    let run = run.args(&["--net", &format!("vhost_user=on,socket={socket}")]);
    in_a_guest(turn, set_up, run, BY_PASST)
}

/// Who answers the guest, for as long as these jobs are kept: on the processor that no VMM has.
fn serve(turn: &Turn<'_>, ends: Ends) -> Result<[Job; 2]> {
    let host = turn.host;
    let Ends {
        listening: address,
        place,
        ..
    } = ends;
    let servers = [
        host.spawn(&format!("exec {place}taskset -c 0 iperf3 -s -B {address}"))?,
        host.spawn(&format!(
            "exec {place}taskset -c 0 lab-net serve {address}:{PORT}"
        ))?,
    ];
    host.run(&format!(
        "for each in $(seq 100); do [ \"$({place}ss -Hltn src {address} | wc -l)\" = 2 ] && exit; sleep 0.1; done; exit 1"
    ))?;
    Ok(servers)
}

fn in_a_guest(turn: &Turn<'_>, set_up: &SetUp, run: GuestRun, ends: Ends) -> Result<Vec<Reading>> {
    let seconds = turn.seconds;
    let Ends { guest, server, .. } = ends;
    let _servers = serve(turn, ends)?;
    let mut script = format!(
        "{}ip addr add {guest} dev eth0; ip link set eth0 up\n\
         for each in $(seq 60); do ! ping -c 1 -W 1 {server} >/dev/null || break; done\n",
        interrupts("virtio[0-9]+-(input|output)|eth0")
    );
    script += &marked(
        TRIPS,
        &format!(
            "lab-net trips {server}:{PORT} {seconds} >{REPORT}.words; tr ' ' ',' <{REPORT}.words >{REPORT}"
        ),
        REPORT,
    );
    for (name, _, way) in STREAMS {
        // Its report of a failure is the end of the console then, which the error shows.
        let client = format!(
            "iperf3 -c {server} -t {seconds} -i 0 -J {way} >{REPORT} || {{ cat {REPORT}; exit 1; }}"
        );
        script += &marked(name, &client, REPORT);
    }
    let run = run
        .net_programs()
        .limit(Duration::from_secs(180 + 6 * u64::from(seconds)))
        .script(&script);
    let guest = turn.host.guest(&run)?.success()?;
    let mut readings = vec![turn.reading(set_up, TRIPS, trips(guest.block(TRIPS)?)?, &guest)?];
    for (name, ..) in STREAMS {
        readings.push(stream(turn, set_up, name, &guest)?);
    }
    Ok(readings)
}

fn stream(turn: &Turn<'_>, set_up: &SetUp, name: &str, guest: &GuestResult) -> Result<Reading> {
    let moved = iperf::parse(guest.block(name)?, name)?;
    turn.reading(set_up, name, (moved.megabytes, moved.per_second), guest)
}

/// What `lab-net` said, with a comma for its blank: how many round trips, and how many a second.
fn trips(said: &str) -> Result<(f64, f64)> {
    let number = |key: &str| {
        let mut words = said.trim().split(',');
        let value = words.find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let number: Option<f64> = value.and_then(|value| value.parse().ok());
        number
            .filter(|number| number.is_finite() && *number > 0.0)
            .with_context(|| format!("no {key}= above 0 in what lab-net said: {said:?}"))
    };
    let trips = number("trips")?;
    Ok((trips, trips / number("seconds")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trips_are_read_and_what_is_cut_off_is_named() {
        assert_eq!(trips("trips=300,seconds=1.500\n").unwrap(), (300.0, 200.0));
        for (said, key) in [
            ("", "trips"),
            ("trips=0,seconds=1", "trips"),
            ("trips=5,sec", "seconds"),
            ("trips=5,seconds=inf", "seconds"),
        ] {
            let error = trips(said).unwrap_err().to_string();
            assert!(error.starts_with(&format!("no {key}= above 0")), "{error}");
        }
    }

    #[test]
    fn every_counterpart_is_a_set_up_of_qemus() {
        for set_up in SET_UPS {
            let counterpart = set_up.counterpart.unwrap_or(REFERENCE);
            assert!(counterpart.starts_with("qemu-"), "{counterpart}");
            assert!(SET_UPS.iter().any(|each| each.name == counterpart));
        }
        assert!(
            RARE.iter()
                .all(|rare| SET_UPS.iter().any(|each| each.name == *rare))
        );
    }
}
