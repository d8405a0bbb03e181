//! `ctl list`: the VMs that run here, as far as they can be seen.

use std::path::Path;
use std::thread;
use std::time::Duration;

use busway_iommu::printable;
use serde_json::{Value, json};

use super::answer::{list, number};
use super::columns::{Cell, Column, short_bytes, table};
use super::find::{Found, Search, search};
use super::info;
use crate::cli::style::{Screen, Style};
use crate::control::client::{self, ClientError};

/// How long each has to answer. All are asked at once.
const LIMIT: Duration = Duration::from_secs(2);

/// A VM, and what it answers.
#[derive(Debug)]
struct Asked {
    found: Found,
    info: Result<Value, ClientError>,
}

/// What is there: for people, or as JSON.
pub(super) fn show(proc: &Path, as_json: bool, screen: Screen) -> String {
    let Search {
        found,
        without,
        unseen,
    } = search(proc);
    let asked = ask(found);
    match as_json {
        true => {
            let vms: Vec<_> = asked.iter().map(one_json).collect();
            let all = json!({ "vms": vms, "without_socket": without, "unseen": unseen });
            format!("{all:#}\n")
        }
        false => text(&asked, &without, unseen, screen),
    }
}

/// Asks all of them. One that ended meanwhile, and what is no VM, is none.
fn ask(found: Vec<Found>) -> Vec<Asked> {
    let one = |found: &Found| client::ask(&found.reach, "GET", "vm.info", None, LIMIT);
    let answers = thread::scope(|scope| {
        let asking: Vec<_> = found
            .iter()
            .map(|vm| scope.spawn(move || one(vm)))
            .collect();
        let answers = asking.into_iter().map(|asking| asking.join().ok());
        answers.collect::<Vec<_>>()
    });
    let asked = found.into_iter().zip(answers).filter_map(|(found, info)| {
        let asked = Asked { found, info: info? };
        let gone = matches!(
            asked.info,
            Err(ClientError::Absent(_)
                | ClientError::NoSocket(_)
                | ClientError::Dead(_)
                | ClientError::Foreign { .. })
        );
        (!gone).then_some(asked)
    });
    asked.collect()
}

/// A word for what it does, and whether that is as it should be.
fn state(asked: &Asked) -> (String, Style) {
    match &asked.info {
        Ok(info) if info["held"] == true => ("held".to_owned(), Style::WARN),
        Ok(info) => match info["state"].as_str() {
            Some("Running") => ("running".to_owned(), Style::GOOD),
            state => {
                let state = printable(state.unwrap_or_default());
                (state.to_lowercase(), Style::WARN)
            }
        },
        Err(ClientError::Refused { status: 404, .. }) => ("empty".to_owned(), Style::PLAIN),
        Err(ClientError::Denied { .. }) => ("not yours".to_owned(), Style::WARN),
        Err(ClientError::Silent { .. }) => ("no answer".to_owned(), Style::BAD),
        Err(_) => ("broken".to_owned(), Style::BAD),
    }
}

fn devices(info: &Value) -> usize {
    let of = |part: &str| list(info, &format!("/config/{part}")).len();
    of("devices") + of("disks") + of("net") + of("fs") + of("pmem") + of("generic_vhost_user")
}

fn one_json(asked: &Asked) -> Value {
    let mut json = json!({
        "socket": asked.found.socket,
        "pid": asked.found.pid,
        "state": state(asked).0,
    });
    if let Ok(info) = &asked.info {
        json["vcpus"] = json!(number(info, "/config/cpus/boot_vcpus"));
        json["memory_bytes"] = json!(number(info, "/memory_actual_size"));
        json["devices"] = json!(devices(info));
    }
    json
}

fn text(asked: &[Asked], without: &[u32], unseen: usize, screen: Screen) -> String {
    const COLUMNS: [Column; 6] = [
        Column::words("SOCKET"),
        Column::number("PID"),
        Column::words("STATE"),
        Column::number("VCPUS").rank(2),
        Column::number("MEMORY").rank(1),
        Column::number("DEVICES").rank(3),
    ];
    let rows: Vec<_> = asked.iter().map(row).collect();
    let mut text = match rows.is_empty() {
        true => "no VM with a control socket is to be seen here\n".to_owned(),
        false => table(&COLUMNS, &rows, screen),
    };
    if !without.is_empty() {
        let pids: Vec<_> = without.iter().map(u32::to_string).collect();
        let (process, has) = match without.len() {
            1 => ("process", "has"),
            _ => ("processes", "have"),
        };
        text += &format!(
            "{process} {} {has} a VM without a control socket: only `--api-socket` makes one\n",
            pids.join(", ")
        );
    }
    if unseen > 0 {
        let of = match unseen {
            1 => "1 process that may have a VM is another user's".to_owned(),
            count => format!("{count} processes that may have VMs are other users'"),
        };
        text += &format!("{of}: root sees those as well\n");
    }
    text
}

fn row(asked: &Asked) -> Vec<Cell> {
    let (word, style) = state(asked);
    let mut row = vec![
        Cell::from(printable(&asked.found.socket.display().to_string())),
        asked.found.pid.to_string().into(),
        Cell::styled(word, style),
    ];
    if let Ok(info) = &asked.info {
        row.push(number(info, "/config/cpus/boot_vcpus").to_string().into());
        row.push(short_bytes(info::memory_bytes(info) as f64).into());
        row.push(devices(info).to_string().into());
    }
    row
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(socket: &str, info: Result<Value, ClientError>) -> Asked {
        Asked {
            found: Found {
                socket: socket.into(),
                reach: socket.into(),
                pid: 4711,
            },
            info,
        }
    }

    fn some() -> Vec<Asked> {
        let running = json!({
            "state": "Running", "memory_actual_size": 8_u64 << 30,
            "config": { "cpus": { "boot_vcpus": 4 }, "devices": [{}], "disks": [{}, {}] },
        });
        let mut held = running.clone();
        held["held"] = true.into();
        let silent = ClientError::Silent {
            path: "s".into(),
            limit: LIMIT,
        };
        let empty = ClientError::Refused {
            path: "s".into(),
            status: 404,
            messages: Vec::new(),
        };
        vec![
            asked("/run/user/1000/database.sock", Ok(running)),
            asked("/run/held", Ok(held)),
            asked("/run/stuck", Err(silent)),
            asked("/run/waits", Err(empty)),
        ]
    }

    #[test]
    fn each_is_shown_with_what_it_does_in_80_columns_and_in_fewer() {
        let wide = "\
SOCKET                         PID  STATE      VCPUS  MEMORY  DEVICES
/run/user/1000/database.sock  4711  running        4    8GiB        3
/run/held                     4711  held           4    8GiB        3
/run/stuck                    4711  no answer
/run/waits                    4711  empty
";
        assert_eq!(text(&some(), &[], 0, Some(80).into()), wide);
        let narrow = "\
SOCKET                         PID  STATE      MEMORY
/run/user/1000/database.sock  4711  running      8GiB
/run/held                     4711  held         8GiB
/run/stuck                    4711  no answer
/run/waits                    4711  empty
";
        assert_eq!(text(&some(), &[], 0, Some(54).into()), narrow);
    }

    #[test]
    fn what_cannot_be_seen_is_said() {
        let expected = "\
no VM with a control socket is to be seen here
processes 7, 9 have a VM without a control socket: only `--api-socket` makes one
2 processes that may have VMs are other users': root sees those as well
";
        assert_eq!(text(&[], &[7, 9], 2, Screen::default()), expected);
        let one = text(&[], &[7], 1, Screen::default());
        assert!(one.contains("\nprocess 7 has a VM"), "{one}");
        assert!(one.contains("\n1 process that may have a VM is another user's"));
    }

    #[test]
    fn scripts_find_the_same_by_name() {
        let some = some();
        let json: Vec<_> = some.iter().map(one_json).collect();
        assert_eq!(
            json[0],
            json!({
                "socket": "/run/user/1000/database.sock", "pid": 4711, "state": "running",
                "vcpus": 4, "memory_bytes": 8_u64 << 30, "devices": 3,
            })
        );
        assert_eq!(
            json[2],
            json!({ "socket": "/run/stuck", "pid": 4711, "state": "no answer" })
        );
    }
}
