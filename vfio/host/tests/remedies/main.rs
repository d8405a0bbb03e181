//! Every remedy of every made-up host is pasted into a shell, and the arguments that its programs get are
//! those that were meant.

mod chroot;
#[path = "../fake_host/mod.rs"]
mod fake_host;

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::{Command as Process, Output};

use busway_host::{Check, Command, Host, Permits, Program, Word, check_bind, examine};
use fake_host::FakeHost;
use fake_host::library::{HOSTS, REPORTED};

/// The files by which each boot loader is known whose command line a command changes.
const LOADERS: [(&str, &str); 11] = [
    ("none", ""),
    (
        "GRUB on Debian",
        "file etc/os-release ID=debian\nfile etc/default/grub X=1",
    ),
    (
        "GRUB on SUSE",
        "file etc/os-release ID=sles\nfile etc/default/grub X=1",
    ),
    (
        "GRUB on Arch",
        "file etc/os-release ID=arch\nfile etc/default/grub X=1",
    ),
    ("GRUB on Fedora", "file etc/os-release ID=fedora"),
    ("a system of images", "file run/ostree-booted \"\""),
    (
        "Proxmox",
        "file etc/kernel/proxmox-boot-uuids A-B\nfile etc/kernel/cmdline ro",
    ),
    (
        "systemd-boot on Debian",
        "file etc/os-release ID=debian\nfile etc/kernel/cmdline ro",
    ),
    (
        "systemd-boot on openSUSE",
        "file etc/os-release ID=opensuse\nfile etc/kernel/cmdline ro",
    ),
    (
        "unified images on Arch",
        "file etc/os-release ID=arch\nfile etc/kernel/cmdline ro\n\
         file etc/mkinitcpio.d/linux.preset default_uki=/efi/a.efi",
    ),
    (
        "Pop!_OS",
        "file etc/os-release ID=pop\nfile etc/kernelstub/configuration {}",
    ),
];

/// What else a host may be called by whoever means harm: its kernel, a word of its command line, the
/// service that asks, a process.
const HARMFUL: [&str; 5] = [
    "$(reboot)",
    "`id`;id",
    "a'b\\\";reboot;#",
    "x/y&z|id",
    "-rf*~{a,b}!",
];

/// Made-up hosts for the remedies that those of the library do not have.
fn more_hosts() -> Vec<(String, FakeHost)> {
    let mut all = Vec::new();
    for (loader, files) in LOADERS {
        for name in HARMFUL {
            let mut host = FakeHost::described(
                "cpu GenuineIntel \"Made up\" family=6 model=106 count=4 flags=vmx,ept bits=46
                 acpi APIC DMAR
                 memory 16G
                 user 1000 groups=1000 memlock=8M files=1024
                 device 00:1f.6 8086:15bc class=020000 driver=e1000e",
            );
            host.add(files);
            host.file(
                "proc/cmdline",
                &format!("ro mitigations=off pcie_acs_override={name}\n"),
            );
            host.file("proc/sys/kernel/osrelease", &format!("6.1-{name}\n"));
            host.file(
                "proc/self/cgroup",
                &format!("0::/system.slice/{name}.service\n"),
            );
            all.push((format!("{loader} with {name}"), host));
        }
    }
    all
}

/// Every command of every host: what check says of each device and what the doctor does.
fn commands() -> Vec<(String, Command)> {
    let mut all = Vec::new();
    let library = HOSTS.iter().chain(&REPORTED);
    let library = library.map(|(name, _)| ((*name).to_owned(), FakeHost::named(name)));
    for (name, fake) in library.chain(more_hosts()) {
        let opens = |_: &Path| Ok(());
        let host = Host::read(&fake.root).unwrap();
        let mut findings = examine(&fake.root, 64 << 30, &opens);
        for device in host.devices() {
            let asked = BTreeSet::from([device.address]);
            let check = Check::of(&host, &asked, 64 << 30, &opens);
            findings.extend(check.devices.into_iter().flat_map(|device| device.findings));
            findings.extend(check.host);
        }
        let remedies = findings.into_iter().flat_map(|finding| finding.remedies);
        let found = remedies.filter_map(|remedy| Some((name.clone(), remedy.command?)));
        all.extend(found);
    }
    all.sort_by_key(|(_, command)| command.to_string());
    all.dedup_by_key(|(_, command)| command.to_string());
    all
}

/// A folder with a program of each name, which prints its own name and its arguments; `sed` and the like
/// included, and nothing else.
fn programs(names: &BTreeSet<String>) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for name in names {
        let text = format!(
            "#!/bin/sh\nprintf '%s\\0' {name} \"$@\" >> \"$SEEN\"\nprintf '\\n' >> \"$SEEN\"\n"
        );
        let path = folder.path().join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    folder
}

/// The line with each file that output goes to put below the folder `$TO`, so that nothing of this
/// machine is written.
fn below(command: &Command) -> String {
    let mut line = command.to_string();
    for Program { output, .. } in command.steps() {
        let Some(output) = output else { continue };
        for sign in [" >> ", " > "] {
            let quoted = Command::new(["x"]).operand(&output.path).to_string();
            let target = quoted.strip_prefix("x ").unwrap();
            line = line.replace(
                &format!("{sign}{target}"),
                &format!("{sign}\"$TO\"{target}"),
            );
        }
    }
    line
}

fn shell(words: &[&str], line: &str, with: &[(&str, &OsStr)]) -> Output {
    let mut shell = Process::new("/bin/sh");
    shell.args(words).arg("-c").arg(line).env_clear();
    shell.envs(with.iter().copied()).output().unwrap()
}

/// What the programs of a command are to be given; none for what only the shell knows.
fn meant(command: &Command) -> Vec<Vec<Option<OsString>>> {
    let word = |word: &Word| match word {
        Word::Exact(bytes) => Some(bytes.clone()),
        Word::ShellProcess | Word::Printed(_) => None,
    };
    let steps = command.steps().iter();
    steps
        .map(|step| step.words.iter().map(word).collect())
        .collect()
}

#[test]
fn every_remedy_is_pasted_as_it_is_meant() {
    let commands = commands();
    assert!(commands.len() > 60, "{}", commands.len());
    let mut names = BTreeSet::new();
    for (_, command) in &commands {
        for step in command.steps() {
            if let Some(Word::Exact(name)) = step.words.first() {
                names.insert(name.to_str().unwrap().to_owned());
            }
        }
    }
    // Builtins of the shell, which write into files below the folder.
    for builtin in ["echo", "printf", "kill"] {
        names.remove(builtin);
    }
    names.insert("id".to_owned());
    let programs = programs(&names);
    for (host, command) in &commands {
        let line = command.to_string();
        assert!(!line.contains(char::is_control), "{host}: {line:?}");
        let parsed = shell(&["-n"], &line, &[]);
        assert!(parsed.status.success(), "{host}: {line}: {parsed:?}");
        // A process of this machine is not to be ended, nor is what a builtin does to be seen.
        let line = below(command);
        let functions = "kill() { printf '%s\\0' kill \"$@\" >> \"$SEEN\"; printf '\\n' >> \"$SEEN\"; }\n\
                         echo() { printf '%s\\0' echo \"$@\" >> \"$SEEN\"; printf '\\n' >> \"$SEEN\"; \
                         printf '%s\\n' \"$*\"; }\n";
        let folder = tempfile::tempdir().unwrap();
        for Program { output, .. } in command.steps() {
            let to = output.iter().map(|output| Path::new(&output.path));
            for to in to {
                let to = to.parent().unwrap().strip_prefix("/").unwrap();
                fs::create_dir_all(folder.path().join(to)).unwrap();
            }
        }
        let seen = tempfile::NamedTempFile::new().unwrap();
        let run = shell(
            &[],
            &format!("{functions}{line}"),
            &[
                ("PATH", programs.path().as_os_str()),
                ("SEEN", seen.path().as_os_str()),
                ("TO", folder.path().as_os_str()),
            ],
        );
        assert!(
            run.status.success() && run.stderr.is_empty(),
            "{host}: {line}: {run:?}"
        );
        let mut got = fs::read(seen.path()).unwrap();
        for (step, words) in command.steps().iter().zip(meant(command)) {
            if words[0].as_deref() == Some(OsStr::new("printf")) {
                assert!(step.output.is_some(), "{host}: {line}");
                continue;
            }
            for word in words {
                let end = got.iter().position(|byte| *byte == 0).unwrap();
                let mut rest = got.split_off(end);
                // A program that the shell runs for its output comes first.
                if got == b"id" && word.as_deref() != Some(OsStr::new("id")) {
                    let next = rest.iter().position(|byte| *byte == b'\n').unwrap();
                    got = rest.split_off(next + 1);
                    let end = got.iter().position(|byte| *byte == 0).unwrap();
                    rest = got.split_off(end);
                }
                if let Some(word) = word {
                    let given = OsString::from_vec(got);
                    assert_eq!(given, word, "{host}: {line}");
                }
                got = rest.split_off(1);
            }
            assert_eq!(got.first(), Some(&b'\n'), "{host}: {line}: {got:?}");
            got.remove(0);
        }
        assert!(got.is_empty(), "{host}: {line}: {got:?}");
        for output in command
            .steps()
            .iter()
            .filter_map(|step| step.output.as_ref())
        {
            let bytes = output.path.as_bytes();
            let path = folder.path().join(OsStr::from_bytes(&bytes[1..]));
            assert!(path.is_file(), "{host}: {line}");
        }
    }
}

#[test]
fn commands_in_refusals_are_on_lines_that_a_shell_can_parse() {
    for (name, _) in HOSTS.iter().chain(&REPORTED) {
        let fake = FakeHost::named(name);
        let host = Host::read(&fake.root).unwrap();
        for device in host.devices() {
            let asked = BTreeSet::from([device.address]);
            for refusal in check_bind(&host, &asked, &Permits::new()) {
                let text = refusal.to_string();
                let steers = |c: char| c.is_control() && c != '\n';
                assert!(!text.contains(steers), "{name}: {text:?}");
                for line in text.lines().filter(|line| line.starts_with("    ")) {
                    let Some((_, command)) = line.split_once(" first: ") else {
                        continue;
                    };
                    let parsed = shell(&["-n"], command, &[]);
                    assert!(parsed.status.success(), "{name}: {command}: {parsed:?}");
                }
            }
        }
    }
}

#[test]
fn hostile_names_stay_names() {
    let all = commands();
    let lines: Vec<_> = all.iter().map(|(_, command)| command.to_string()).collect();
    for line in [
        "umount '/mnt/x --lazy /'",
        "zpool export -- 'my pool'",
        "cryptsetup close -- 'x; reboot'",
        "multipath -f -- -f",
        "lvchange --activate n '/dev/mapper/\\x24\\x28reboot\\x29'",
        "ip link set dev '$(reboot)' nomaster",
        "ip link set dev -h nomaster",
        "ovs-vsctl del-port -- ens2f0",
        "ip link delete dev storage",
    ] {
        assert!(
            lines.iter().any(|known| known == line),
            "{line}\n{lines:#?}"
        );
    }
}
