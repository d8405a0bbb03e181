//! Each row of the table is of use: trials make the call, or the table says why it is there nevertheless.
//!
//! `used.txt` has what each kind of thread was seen to ask for: a line is a kind, a call, and those of its arguments that the table
//! tells apart. `scripts/calls` makes it of traces of `tests/kvm` and of what the lab's hosts count.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::env;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use super::kind::Kind;
use super::table::{self, Row, SPARE, When};
use crate::arch::system_calls::call_name;

const USED: &str = "src/sandbox/used.txt";

/// What is told apart of a kind's calls: the call's name, and an argument.
type Call = (String, Option<u32>);
type Uses = BTreeMap<Kind, BTreeSet<Call>>;

/// How the names of a kind's threads begin. What a thread does before it has its own name counts as its maker's.
const THREADS: &[(&str, Kind)] = &[
    ("vcpu", Kind::Vcpu),
    ("_disk", Kind::Disk),
    ("_pmem", Kind::Disk),
    ("_net", Kind::Net),
    ("_vhost", Kind::Vhost),
    ("_vsock", Kind::Vsock),
    ("vsock-out", Kind::VsockPorts),
    ("vu-", Kind::VhostUser),
    ("vhost-user", Kind::VhostUser),
    ("_console", Kind::Console),
    ("_rng", Kind::Entropy),
    ("_entropy", Kind::Entropy),
    ("_balloon", Kind::Entropy),
    ("_memory", Kind::Memory),
    ("http", Kind::Http),
    ("log", Kind::Log),
    ("console-out", Kind::ConsoleOutput),
    ("stdin", Kind::Input),
    ("serial-in", Kind::Input),
    ("unmask", Kind::Unmask),
    ("variables", Kind::Variables),
    ("tpm", Kind::Tpm),
    ("populate", Kind::Populate),
    ("steer", Kind::Steer),
    ("report", Kind::Report),
    ("progress", Kind::Progress),
    ("given-up", Kind::GivenUp),
    ("supervisor", Kind::Supervisor),
    ("assemble", Kind::Main),
    ("restart", Kind::Main),
    ("end", Kind::Main),
    ("attach", Kind::Main),
    ("release", Kind::Main),
    ("pause", Kind::Main),
    ("plug", Kind::Main),
];

/// The first thread of each process of Busway's, whatever it does.
const FIRST: &str = "busway";

/// The place of the argument that the table tells a call apart by.
fn argument(call: &str) -> Option<u8> {
    match call {
        "ioctl" | "fcntl" => Some(1),
        "prctl" | "socket" | "socketpair" => Some(0),
        _ => None,
    }
}

fn kind_of(thread: &str) -> Option<Kind> {
    // A test's own threads are named after it, as `tpm::…`.
    let mut known = THREADS.iter().filter(|_| !thread.contains(':'));
    known
        .find(|(begin, _)| thread.starts_with(begin))
        .map(|(_, kind)| *kind)
}

/// What a row stands for: the call alone, or with each value of an argument that is told apart.
fn calls((number, when): &Row) -> Vec<Call> {
    let name = call_name(*number).unwrap_or("unknown").to_owned();
    match when {
        When::Is(place, values) if argument(&name) == Some(*place) => {
            let values = values.iter();
            values.map(|value| (name.clone(), Some(*value))).collect()
        }
        _ => vec![(name, None)],
    }
}

/// Whether a kind, or where there is none, any, was seen to make a call.
fn is_used(uses: &Uses, kind: Option<Kind>, (name, value): &Call) -> bool {
    let mut calls = uses
        .iter()
        .filter(|(one, _)| kind.is_none_or(|kind| kind == **one))
        .flat_map(|(_, calls)| calls);
    calls.any(|(other, with)| other == name && (value.is_none() || value == with))
}

/// Whether the table says why a call is there that is not made.
fn is_spare(kind: Option<Kind>, call: &Call) -> bool {
    let mut spare = SPARE.iter();
    spare.any(|(_, of, rows)| {
        let is_of = match kind {
            Some(kind) => of.is_empty() || of.contains(&kind),
            None => of.is_empty(),
        };
        is_of
            && rows
                .iter()
                .copied()
                .flatten()
                .flat_map(calls)
                .any(|one| one == *call)
    })
}

/// The rows of the table: those that all kinds have, and those that each has beside.
fn rows() -> Vec<(Option<Kind>, Call)> {
    let common = table::COMMON.iter().flat_map(calls);
    let common = common.map(|call| (None, call));
    let own = Kind::ALL.into_iter().flat_map(|kind| {
        let rows = table::own(kind).iter().copied().flatten();
        rows.flat_map(calls).map(move |call| (Some(kind), call))
    });
    common.chain(own).collect()
}

fn words((kind, (name, value)): &(Option<Kind>, Call)) -> String {
    let kind = kind.map_or("any".to_owned(), |kind| format!("{kind:?}"));
    let value = value.map_or(String::new(), |value| format!(" {value:#x}"));
    format!("{kind} {name}{value}")
}

#[test]
fn whatever_a_kind_is_allowed_it_was_seen_to_do_or_the_table_says_why_it_may() {
    let uses = read(&fs::read_to_string(USED).unwrap());
    let idle = rows()
        .into_iter()
        .filter(|(kind, call)| !is_used(&uses, *kind, call) && !is_spare(*kind, call));
    let idle: Vec<_> = idle.map(|row| words(&row)).collect();
    assert!(idle.is_empty(), "nothing does this:\n{}", idle.join("\n"));
}

#[test]
fn what_the_table_gives_a_reason_for_is_in_it_and_is_not_all_used() {
    let uses = read(&fs::read_to_string(USED).unwrap());
    let rows = rows();
    for (why, kinds, spare) in SPARE {
        let spare: BTreeSet<Call> = spare.iter().copied().flatten().flat_map(calls).collect();
        let of = |kind: &Option<Kind>| {
            kinds.is_empty() || kind.is_some_and(|kind| kinds.contains(&kind))
        };
        let mut idle = rows.iter().filter(|(kind, call)| {
            of(kind) && spare.contains(call) && !is_used(&uses, *kind, call)
        });
        assert!(idle.next().is_some(), "{why}: {kinds:?} {spare:?}");
        // Each is a row of theirs.
        for call in &spare {
            let is_row = rows.iter().any(|(kind, one)| of(kind) && one == call);
            assert!(is_row, "{why}: {}", words(&(None, call.clone())));
        }
    }
}

/// `SNAPSHOTS=add` or `anew`, and `BUSWAY_CALLS`: the folder with what was noted. scripts/calls
#[test]
fn what_was_noted_is_written_where_that_is_asked_for() {
    let (Some(folder), Ok(how)) = (env::var_os("BUSWAY_CALLS"), env::var("SNAPSHOTS")) else {
        return;
    };
    let mut uses = match how.as_str() {
        "add" => read(&fs::read_to_string(USED).unwrap_or_default()),
        _ => Uses::new(),
    };
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
        match is_counted(&path) {
            true => add_counted(&mut uses, &text),
            false => add_traced(&mut uses, &text),
        }
    }
    fs::write(USED, written(&uses)).unwrap();
}

fn is_counted(path: &Path) -> bool {
    let name = path.file_name().unwrap_or_default();
    name.as_encoded_bytes().starts_with(b"lab-")
}

fn read(text: &str) -> Uses {
    let mut uses = Uses::new();
    for line in text.lines().filter(|line| !line.starts_with('#')) {
        let mut words = line.split_ascii_whitespace();
        let (Some(kind), Some(name)) = (words.next(), words.next()) else {
            continue;
        };
        let kind = Kind::ALL.into_iter().find(|one| format!("{one:?}") == kind);
        let kind = kind.unwrap_or_else(|| panic!("{line}"));
        let calls = uses.entry(kind).or_default();
        calls.insert((name.to_owned(), None));
        for value in words {
            let value = u32::from_str_radix(value.trim_start_matches("0x"), 16).unwrap();
            calls.insert((name.to_owned(), Some(value)));
        }
    }
    uses
}

fn written(uses: &Uses) -> String {
    let mut text =
        "# What each kind of thread was seen to ask the kernel for: scripts/calls.\n".to_owned();
    for (kind, calls) in uses {
        let mut last = "";
        for (name, value) in calls {
            if name != last {
                let _ = write!(text, "\n{kind:?} {name}");
                last = name;
            }
            if let Some(value) = value {
                let _ = write!(text, " {value:#x}");
            }
        }
        text.push('\n');
    }
    text
}

fn add(uses: &mut Uses, kind: Kind, name: &str, value: Option<u32>) {
    let calls = uses.entry(kind).or_default();
    calls.insert((name.to_owned(), None));
    if value.is_some() {
        calls.insert((name.to_owned(), value));
    }
}

/// Lines as strace(1) has them, cut off behind two arguments: `12<vcpu0> ioctl(0x11, 0xae80`.
fn add_traced(uses: &mut Uses, text: &str) {
    let mut filtered = HashSet::new();
    for line in text.lines() {
        let Some((thread, rest)) = line.trim_start().split_once("> ") else {
            continue;
        };
        let (Some((id, name)), Some((call, arguments))) =
            (thread.split_once('<'), rest.split_once('('))
        else {
            continue;
        };
        if call == "seccomp" && name == FIRST {
            filtered.insert(id.to_owned());
        }
        let kind = match name == FIRST {
            true => filtered.contains(id).then_some(Kind::Main),
            false => kind_of(name),
        };
        let value = argument(call).and_then(|place| {
            let value = arguments.split(", ").nth(place.into())?;
            u32::from_str_radix(value.trim().strip_prefix("0x")?, 16).ok()
        });
        if let Some(kind) = kind {
            add(uses, kind, call, value);
        }
    }
}

/// Histograms of the lab's hosts: `{ common_pid: vcpu0 [ 12], cmd: ae80 } hitcount: 3`. Of a process's first thread only requests
/// count, for what it does before its filter is there is not told apart.
fn add_counted(uses: &mut Uses, text: &str) {
    let fields = |line: &str| -> Option<(String, String, u64)> {
        let inner = line.strip_prefix('{')?.split_once('}')?.0.to_owned();
        let (thread, value) = inner.split_once("],")?;
        let (name, id) = thread.split_once("common_pid:")?.1.rsplit_once('[')?;
        let (key, value) = value.split_once(':')?;
        let radix = if key.trim() == "cmd" { 16 } else { 10 };
        Some((
            name.trim().to_owned(),
            id.trim().to_owned(),
            u64::from_str_radix(value.trim().trim_start_matches("0x"), radix).ok()?,
        ))
    };
    let mut filtered = HashSet::new();
    let mut event = "";
    for line in text.lines() {
        if let Some(next) = line.strip_prefix("event ") {
            event = next.trim();
            continue;
        }
        let Some((name, id, value)) = fields(line) else {
            continue;
        };
        let call = match event.rsplit_once("sys_enter_") {
            Some((_, call)) => call.to_owned(),
            None => {
                let number = i64::try_from(value).unwrap_or(-1);
                call_name(number).unwrap_or("unknown").to_owned()
            }
        };
        let kind = match name == FIRST {
            true if call == "seccomp" => {
                filtered.insert(id);
                None
            }
            true => (filtered.contains(&id) && event.ends_with("ioctl")).then_some(Kind::Main),
            false => kind_of(&name),
        };
        let value = u32::try_from(value)
            .ok()
            .filter(|_| event.contains("enter_"));
        if let Some(kind) = kind {
            add(uses, kind, &call, value);
        }
    }
}
