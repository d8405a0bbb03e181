//! What `bind`, `unbind`, `restore`, `vfs` and `busway hugepages` print, and what they refuse.

use std::path::Path;

use busway::cli::hugepages::{self, HugepagesArgs};
use clap::{Args as _, FromArgMatches as _};
use snapbox::{assert_data_eq, file};

use super::fake_host::{FakeHost, FakeKernel, Spec};
use super::{laptop, parse, refused, run_with, server};

/// What a command says, without the paths that differ from run to run.
fn say(host: &FakeHost, kernel: &mut FakeKernel, words: &str) -> String {
    let text = match run_with(host, kernel, words, None) {
        Ok(text) => text,
        Err(error) => format!("exit status {}\n{error}\n", error.exit_status()),
    };
    format!("$ busway device {words}\n{}\n", tidy(host, &text))
}

fn tidy(host: &FakeHost, text: &str) -> String {
    let root = host.root.sys.parent().unwrap().display().to_string();
    let program = std::env::current_exe().unwrap().display().to_string();
    text.replace(&root, "").replace(&program, "/usr/bin/busway")
}

fn say_all(host: &FakeHost, kernel: &mut FakeKernel, words: &[&str]) -> String {
    words.iter().map(|words| say(host, kernel, words)).collect()
}

#[test]
fn a_dry_run_prints_the_writes() {
    let host = laptop();
    let mut kernel = host.kernel();
    let mut said = say_all(
        &host,
        &mut kernel,
        &[
            "bind --dry-run 01:00.0 01:00.1",
            "bind -n --persist --user 1000 01:00.0 01:00.1",
            "bind -n --driver mlx5_vfio_pci --allow-group 01:00.0",
            "restore --all -n",
        ],
    );
    assert!(kernel.log.is_empty(), "{:?}", kernel.log);
    run_with(&host, &mut kernel, "bind 01:00.0 01:00.1", None).unwrap();
    kernel.log.clear();
    said += &say_all(
        &host,
        &mut kernel,
        &["unbind -n 01:00.0", "restore -n --all"],
    );
    assert!(kernel.log.is_empty(), "{:?}", kernel.log);
    assert_data_eq!(said, file!["dry-run.txt"].raw());
}

#[test]
fn restore_says_what_became_of_each() {
    let host = laptop();
    let mut kernel = host.kernel();
    let said = say_all(
        &host,
        &mut kernel,
        &[
            "restore --all",
            "restore 01:00.0",
            "bind --persist 01:00.0 01:00.1",
            "restore 01:00.0",
            "bind 01:00.0",
            "restore --all",
            "bind --allow-group 00:1f.0",
            "restore --all",
            "restore 77:00.0",
            "bind --persist 01:00.0 01:00.1",
            "unbind 01:00.0 01:00.1",
        ],
    );
    assert_data_eq!(said, file!["restore.txt"].raw());
}

#[test]
fn what_could_not_be_put_back_is_named_and_kept() {
    let host = laptop();
    let mut kernel = host.kernel();
    let mut said = say(&host, &mut kernel, "bind 01:00.0 01:00.1");
    let stuck =
        |_, request: &str| (request == "drivers/nouveau/bind 0000:01:00.0").then_some(libc::EIO);
    kernel.fails = Box::new(stuck);
    said += &say(&host, &mut kernel, "restore --all");
    kernel.fails = Box::new(|_, _| None);
    said += &say(&host, &mut kernel, "restore --all");
    kernel.fails = Box::new(move |number, request| {
        let last = request.starts_with("drivers/vfio-pci/bind 0000:01:00.1");
        stuck(number, request).or(last.then_some(libc::EINVAL))
    });
    said += &say(&host, &mut kernel, "bind 01:00.0 01:00.1");
    assert_data_eq!(said, file!["stranded.txt"].raw());
}

#[test]
fn a_journal_that_makes_no_sense_is_named() {
    let host = laptop();
    host.file(
        "run/busway/devices.json",
        "{\"version\": 7, \"devices\": {}}",
    );
    let mut kernel = host.kernel();
    let said = say_all(
        &host,
        &mut kernel,
        &["bind 01:00.0 01:00.1", "restore --all"],
    );
    assert!(kernel.log.is_empty(), "{:?}", kernel.log);
    assert_data_eq!(said, file!["journal.txt"].raw());
}

#[test]
fn a_device_that_a_guest_has_is_not_put_back() {
    let host = laptop();
    let mut kernel = host.kernel();
    run_with(&host, &mut kernel, "bind 01:00.0 01:00.1", None).unwrap();
    host.process(4242, "busway", "dev/vfio/1");
    assert_data_eq!(
        refused(&host, "restore --all"),
        file!["refused-restore.txt"].raw()
    );
    assert_data_eq!(
        refused(&host, "bind --driver mlx5_vfio_pci 01:00.0 01:00.1"),
        file!["refused-restore.txt"].raw()
    );
    run_with(&host, &mut kernel, "restore --all --allow-open", None).unwrap();
}

#[test]
fn what_is_no_vfio_driver_and_no_user_is_bad_usage() {
    let error = parse("bind --driver uio_pci_generic 01:00.0").unwrap_err();
    assert_eq!(error.exit_code(), 2);
    assert!(
        error
            .to_string()
            .contains("`uio_pci_generic` is no VFIO driver")
    );
    let host = laptop();
    let error = run_with(
        &host,
        &mut host.kernel(),
        "bind --user nobody-of-this-name 01:00.0 01:00.1",
        None,
    );
    let error = error.unwrap_err();
    assert_eq!(error.exit_status(), 2);
    assert!(
        error.to_string().contains("`nobody-of-this-name`"),
        "{error}"
    );
    for words in [
        "restore",
        "restore --all 01:00.0",
        "vfs 01:00.0 --no-autoprobe",
    ] {
        assert_eq!(parse(words).unwrap_err().exit_code(), 2, "{words}");
    }
}

/// A NIC that can make seven virtual functions.
fn nic() -> FakeHost {
    let mut host = FakeHost::new();
    host.device(&Spec {
        address: "0000:01:00.0",
        behind: "pci0000:00/0000:00:01.0",
        device: 0x10c9,
        driver: Some("igb"),
        ..Spec::default()
    });
    host.interface(Some("0000:01:00.0"), "eth1", &[]);
    host.file("sys/class/net/eth1/ifindex", "3\n");
    host.file("sys/class/net/eth1/flags", "0x1002\n");
    for (name, text) in [
        ("totalvfs", "7"),
        ("numvfs", "0"),
        ("drivers_autoprobe", "1"),
    ] {
        host.file(
            &format!("sys/bus/pci/devices/0000:01:00.0/sriov_{name}"),
            &format!("{text}\n"),
        );
    }
    host
}

#[test]
fn virtual_functions_are_made_set_listed_and_removed() {
    let host = nic();
    let mut kernel = host.kernel();
    let mut said = say_all(
        &host,
        &mut kernel,
        &[
            "vfs 01:00.0",
            "vfs -n 01:00.0 2 --vf 0,mac=02:00:00:00:00:07,vlan=100",
            "vfs 01:00.0 2 --vf 0,mac=02:00:00:00:00:07,vlan=100 --vf 1,trust=on,spoofchk=off",
        ],
    );
    // Set before their driver has them.
    let probed = kernel
        .log
        .iter()
        .position(|request| request.starts_with("drivers_probe"));
    let set = kernel
        .log
        .iter()
        .rposition(|request| request.starts_with("set interface 3"));
    assert!(set < probed, "{:#?}", kernel.log);
    said += &say_all(
        &host,
        &mut kernel,
        &[
            "vfs 01:00.0 --vf 0,vlan=0",
            "vfs 01:00.0 3 --no-autoprobe",
            "bind 01:10.1",
            "vfs 01:00.0",
            "vfs 01:00.0 0",
            "restore --all",
        ],
    );
    assert!(probes(&host));
    assert_data_eq!(said, file!["vfs.txt"].raw());
}

#[test]
fn virtual_functions_are_refused_with_the_reason() {
    let host = nic();
    let mut said = String::new();
    for words in [
        "vfs 77:00.0 1",
        "vfs 01:00.0 8",
        "vfs 01:00.0 2 --vf 2,vlan=5",
        "vfs 01:00.0 --vf 0,vlan=5",
    ] {
        said += &format!("$ busway device {words}\n{}\n", refused(&host, words));
    }
    let host = server();
    for words in [
        "vfs 18:00.0 0",
        "vfs 18:00.0 3",
        "vfs 18:00.1 1",
        "vfs 18:02.0",
    ] {
        said += &format!("$ busway device {words}\n{}\n", refused(&host, words));
    }
    let host = nic();
    let mut kernel = host.kernel();
    run_with(&host, &mut kernel, "bind 01:00.0", None).unwrap();
    said += &format!(
        "$ busway device vfs 01:00.0 1\n{}",
        refused(&host, "vfs 01:00.0 1")
    );
    assert_data_eq!(said, file!["refused-vfs-command.txt"].raw());
}

#[test]
fn virtual_functions_that_cannot_all_be_set_are_removed_again() {
    let words = "vfs 01:00.0 2 --vf 0,mac=02:00:00:00:00:07 --vf 1,vlan=5";
    let mut said = String::new();
    for number in 0.. {
        let host = nic();
        let before = host.state();
        let mut kernel = host.kernel();
        let errno = if number == 2 {
            libc::ENOMEM
        } else {
            libc::EOPNOTSUPP
        };
        kernel.fails = Box::new(move |n, _| (n == number).then_some(errno));
        let text = say(&host, &mut kernel, words);
        if !text.contains("exit status") {
            assert_eq!(number, 9);
            break;
        }
        assert_eq!(host.state(), before, "{:#?}", kernel.log);
        assert!(probes(&host), "{number}");
        said += &text;
    }
    assert_data_eq!(said, file!["vfs-failed.txt"].raw());
}

#[test]
fn the_hosts_drivers_are_kept_from_virtual_functions_until_these_go_or_are_restored() {
    let ends = [
        "vfs 01:00.0 0",
        "vfs 01:00.0 2",
        "restore 01:00.0",
        "restore --all",
    ];
    for end in ends {
        let host = nic();
        let mut kernel = host.kernel();
        let text = say_all(
            &host,
            &mut kernel,
            &[
                "vfs 01:00.0 2 --no-autoprobe",
                "vfs 01:00.0 --vf 0,vlan=7",
                "vfs 01:00.0 2 --no-autoprobe",
                "bind 01:10.0",
                "unbind 01:10.0",
            ],
        );
        assert!(!probes(&host), "{text}");
        assert_eq!(host.driver_of("0000:01:10.0"), None, "{text}");
        let text = say(&host, &mut kernel, end);
        assert!(probes(&host), "{end}: {text}");
        assert!(!host.root.run.join("busway/devices.json").exists());
    }
}

/// Whether the host's drivers may have new virtual functions of the NIC.
fn probes(host: &FakeHost) -> bool {
    let autoprobe = "sys/bus/pci/devices/0000:01:00.0/sriov_drivers_autoprobe";
    let autoprobe = std::fs::read_to_string(host.path(autoprobe)).unwrap();
    autoprobe.trim() == "1"
}

#[test]
fn killed_while_it_makes_virtual_functions_it_leaves_none_withheld_for_good() {
    let words = "vfs 01:00.0 2 --vf 0,mac=02:00:00:00:00:07";
    for finish in ["restore --all", "restore 01:00.0", "vfs 01:00.0 0", words] {
        let mut withheld = 0;
        for number in 0.. {
            let host = nic();
            let mut kernel = host.kernel();
            kernel.dies_at = Some(number);
            let ended = !say(&host, &mut kernel, words).contains("exit status");
            withheld += usize::from(!probes(&host));
            let said = say(&host, &mut host.kernel(), finish);
            assert!(
                probes(&host),
                "killed before {number}, and {finish}: {said}"
            );
            assert!(!said.contains("exit status"), "{said}");
            assert!(!host.root.run.join("busway/devices.json").exists());
            if ended {
                break;
            }
        }
        assert!(withheld >= 3, "it was never in the middle");
    }
}

/// Two nodes, of which the second has room for few.
fn pools() -> FakeHost {
    let host = FakeHost::new();
    host.file(
        "proc/meminfo",
        "MemTotal: 1 kB\nHugepagesize:       2048 kB\n",
    );
    host.file("proc/sys/vm/compact_memory", "");
    for (folder, size, room) in [
        ("devices/system/node/node0", 2048, 4096),
        ("devices/system/node/node0", 1048576, 4),
        ("devices/system/node/node1", 2048, 300),
        ("devices/system/node/node1", 1048576, 0),
        ("kernel/mm", 2048, 4396),
        ("kernel/mm", 1048576, 4),
    ] {
        let pool = format!("sys/{folder}/hugepages/hugepages-{size}kB");
        for name in ["nr_hugepages", "free_hugepages", "surplus_hugepages"] {
            host.file(&format!("{pool}/{name}"), "0\n");
        }
        host.file(&format!("{pool}/room"), &format!("{room}\n"));
    }
    host
}

#[test]
fn huge_pages_are_shown_and_reserved_and_what_is_missing_is_said() {
    let host = pools();
    let mut kernel = host.kernel();
    let mut said = String::new();
    for words in [
        "",
        "8G --node 0 --dry-run",
        "8G --node 0",
        "2G --size 1G",
        "1G --node 1",
        "2G --size 1G --node 1",
        "1G --node 7",
        "1G --size 64K",
        "3M",
        "",
    ] {
        let command = HugepagesArgs::augment_args(clap::Command::new("busway hugepages"));
        let all = std::iter::once("busway hugepages").chain(words.split_whitespace());
        let args = command.try_get_matches_from(all).unwrap();
        let args = HugepagesArgs::from_arg_matches(&args).unwrap();
        let mut out = Vec::new();
        let result = hugepages::run_on(&args, &host.root, &mut kernel, &mut out);
        said += &format!(
            "$ busway hugepages {words}\n{}",
            String::from_utf8(out).unwrap()
        );
        if let Err(error) = result {
            said += &format!("exit status {}\n{error}\n", error.exit_status());
        }
        said += "\n";
    }
    assert_data_eq!(tidy(&host, &said), file!["hugepages.txt"].raw());
}

#[test]
fn vfio_bind_has_every_command() {
    let ok = |text: &str| (0, text.to_owned());
    assert_eq!(
        super::vfio_bind(&["restore", "--all"]),
        ok("device restore --all")
    );
    assert_eq!(
        super::vfio_bind(&["vfs", "01:00.0", "2"]),
        ok("device vfs 01:00.0 2")
    );
    assert_eq!(
        super::vfio_bind(&["-n", "01:00.0"]),
        ok("device bind -n 01:00.0")
    );
    assert_eq!(super::vfio_bind(&["hugepages", "8G"]), ok("hugepages 8G"));
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("scripts/vfio-bind");
    let text = std::fs::read_to_string(program).unwrap();
    for word in ["list", "bind", "unbind", "restore", "vfs", "hugepages"] {
        assert!(
            text.contains(&format!("#   vfio-bind {word}")) || word == "bind",
            "{word}"
        );
    }
}
