//! Every remedy is pasted as root where it can do harm: into a chroot with real mounts and real files, in
//! namespaces of its own. What it names is what changes, and nothing else.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::process::{Command as Process, Stdio};

use busway_host::{Command, Word};

use super::commands;

/// Programs that are the system's own there. All others only say that they were called.
const REAL: [&str; 7] = ["umount", "sed", "mkdir", "echo", "printf", "kill", "sh"];

/// What the chroot begins with, and what must be there at the end.
const PREPARE: &str = r#"
set -e
mount -t tmpfs none "$R"
for d in bin sbin lib lib64 lib32 usr; do
    if [ -e "/$d" ]; then mkdir -p "$R/$d"; mount --rbind "/$d" "$R/$d"; fi
done
mkdir -p "$R/etc/default" "$R/etc/kernel" "$R/dev" "$R/proc" "$R/tmp" "$R/canary" "$R/stub"
: > "$R/dev/null"
echo 'GRUB_CMDLINE_LINUX="canary"' > "$R/etc/default/grub"
echo canary > "$R/etc/kernel/cmdline"
mount -t tmpfs none "$R/canary"
echo canary > "$R/canary/file"
cp "$SCRIPT" "$R/script"
for name in $STUBS; do
    printf '#!/bin/sh\nexit 0\n' > "$R/stub/$name"
done
printf '#!/bin/sh\n[ "$1" = -un ] && echo user && exit\n: > /reached\n' > "$R/stub/id"
for name in reboot halt poweroff; do printf '#!/bin/sh\n: > /reached\n' > "$R/stub/$name"; done
chmod 755 "$R"/stub/*
PATH=/stub:/bin:/sbin:/usr/bin:/usr/sbin exec chroot "$R" /bin/sh /script
"#;

/// A word of a shell, by this test's own rule: the bytes between quotes.
fn quoted(bytes: &[u8]) -> Vec<u8> {
    let mut word = vec![b'\''];
    for &byte in bytes {
        match byte {
            b'\'' => word.extend(br"'\''"),
            byte => word.push(byte),
        }
    }
    word.push(b'\'');
    word
}

fn exact(word: &Word) -> Option<&OsStr> {
    match word {
        Word::Exact(bytes) => Some(bytes),
        Word::ShellProcess | Word::Printed(_) => None,
    }
}

/// The places that a command unmounts.
fn unmounted(command: &Command) -> Vec<Vec<u8>> {
    let steps = command.steps().iter();
    let umounts =
        steps.filter(|step| step.words.first().and_then(exact) == Some("umount".as_ref()));
    let operands = umounts.flat_map(|step| step.words.iter().skip(1));
    operands
        .filter_map(|word| Some(exact(word)?.as_bytes().to_vec()))
        .collect()
}

/// What the chroot's shell does with one command: mounts what is to be unmounted, pastes the line, looks.
fn paste(command: &Command) -> Vec<u8> {
    let mut script = Vec::new();
    let mut line = |parts: &[&[u8]]| {
        script.extend(parts.concat());
        script.push(b'\n');
    };
    let places = unmounted(command);
    // What lies within another is unmounted first, and so mounted last.
    for place in places.iter().rev() {
        let place = quoted(place);
        line(&[b"mkdir -p ", &place, b" && mount -t tmpfs none ", &place]);
    }
    for output in command
        .steps()
        .iter()
        .filter_map(|step| step.output.as_ref())
    {
        let folder = Path::new(&output.path).parent().unwrap();
        line(&[b"mkdir -p ", &quoted(folder.as_os_str().as_bytes())]);
    }
    let text = quoted(command.to_string().as_bytes());
    line(&[b"sh -c ", &text, b" > /out 2>&1; status=$?"]);
    // No process here has the number that a made-up one has.
    let kills = |word: Option<&Word>| word.and_then(exact) == Some("kill".as_ref());
    if !command.steps().iter().any(|step| kills(step.words.first())) {
        line(&[
            b"[ $status = 0 ] || { echo FAILED $status: ",
            &text,
            b"; cat /out; }",
        ]);
    }
    for place in &places {
        let place = quoted(place);
        line(&[
            b"! mountpoint -q ",
            &place,
            b" || echo STILL MOUNTED ",
            &place,
        ]);
    }
    line(&[
        b"[ ! -e /reached ] && mountpoint -q / && mountpoint -q /canary && [ -s /canary/file ] && \
          grep -q canary /etc/default/grub && grep -q canary /etc/kernel/cmdline || { echo HARMED BY: ",
        &text,
        b"; exit 1; }",
    ]);
    script
}

#[test]
fn every_remedy_that_is_pasted_as_root_does_what_it_says_and_no_harm() {
    let namespaces = ["--mount", "--pid", "--fork", "--map-root-user"];
    let can = Process::new("unshare")
        .args(namespaces)
        .args(["mount", "-t", "tmpfs", "x", "/tmp"])
        .stderr(Stdio::null())
        .status();
    if !can.is_ok_and(|status| status.success()) {
        println!("no namespaces of its own for this user: nothing is pasted");
        return;
    }
    let commands = commands();
    let mut script = b"cd /\n".to_vec();
    let mut stubs = BTreeSet::new();
    for (_, command) in &commands {
        for step in command.steps() {
            let name = step.words.first().and_then(exact).and_then(OsStr::to_str);
            stubs.extend(name.filter(|name| !REAL.contains(name)));
        }
        script.extend(paste(command));
    }
    script.extend(b"echo ALL DONE\n");
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("root");
    fs::create_dir(&root).unwrap();
    let path = folder.path().join("script");
    fs::write(&path, script).unwrap();
    let names = stubs.iter().fold(String::new(), |mut names, name| {
        write!(names, "{name} ").unwrap();
        names
    });
    let run = Process::new("unshare")
        .args(namespaces)
        .args(["--kill-child", "/bin/sh", "-c", PREPARE])
        .env("R", &root)
        .env("SCRIPT", &path)
        .env("STUBS", names)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&run.stdout);
    let said: Vec<_> = text.lines().filter(|line| *line != "ALL DONE").collect();
    assert!(
        said.is_empty() && text.ends_with("ALL DONE\n"),
        "{run:?}\n{text}"
    );
    assert!(
        commands
            .iter()
            .any(|(_, command)| unmounted(command).len() > 3)
    );
}
