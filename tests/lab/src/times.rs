//! `lab times`: where the time of a run of `scripts/test` went, for people on the terminal and for tools in JSON.
//!
//! The scripts and the set-up append lines to the file that `BUSWAY_LAB_TIMES` names, one for each part that took
//! time: its name, a tab, and its seconds. Parts do not overlap. The line named `all` has the seconds of the whole run.
//! With what the lab's runner wrote about its trials that becomes `target/times.json`:
//!
//! ```json
//! {
//!   "seconds": 1803.2,
//!   "parts": [{"name": "build", "seconds": 61.5}, {"name": "set-up: the stock kernel", "seconds": 15.0}],
//!   "causes": {"host": 180.1, "guests": 900.0, "working": 950.2, "waiting": 75.0, "emulator": 1700.3},
//!   "trials": {"soak": false, "lanes": 2, "seconds": 1100.0, "trials": [{"name": "…", "seconds": 20.1, …}]}
//! }
//! ```
//!
//! `causes` is the sum over the trials, which run several at once, and `emulator` is processor time: both can be more
//! than `seconds`. A trial has the same keys, and `passed`, `failure`, `last` (its last attempt's seconds), `budget`,
//! `host_boots`, `guest_boots`, `begun_anew` (a reason for each attempt but the last) and `numbers`.

use std::env;
use std::fmt::Write;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use busway_lab::spent::Spent;
use busway_lab::trials::{Trials, folder};
use clap::Args;
use serde::Serialize;

/// Name of the line that has the whole run's seconds.
const ALL: &str = "all";

/// Where the parts' numbers are.
#[derive(Debug, Args)]
pub(crate) struct TimesArgs {
    /// A file with what other parts counted, such as the fuzzing's: lines of a name, a tab, and KEY=VALUE words.
    #[arg(long, value_name = "FILE")]
    numbers: Option<PathBuf>,
}

/// A part of the run.
#[derive(Debug, PartialEq, Serialize)]
struct Part {
    name: String,
    seconds: f64,
}

/// The whole run.
#[derive(Debug, Serialize)]
struct Times {
    seconds: f64,
    parts: Vec<Part>,
    causes: Spent,
    trials: Option<Trials>,
}

impl Times {
    fn new(text: &str, trials: Option<Trials>) -> Self {
        let mut parts = parse(text);
        let sum: f64 = parts
            .iter()
            .filter(|part| part.name != ALL)
            .map(|part| part.seconds)
            .sum();
        let whole = parts.iter().find(|part| part.name == ALL);
        let seconds = whole.map_or(sum, |part| part.seconds);
        parts.retain(|part| part.name != ALL);
        Self {
            seconds,
            parts,
            causes: trials.as_ref().map(Trials::spent).unwrap_or_default(),
            trials,
        }
    }

    fn table(&self) -> String {
        let mut text = String::new();
        let mut rest = self.seconds;
        for Part { name, seconds } in &self.parts {
            rest -= seconds;
            let _ = writeln!(text, "{seconds:>8.1} s  {name}");
        }
        if rest > 0.05 {
            let _ = writeln!(text, "{rest:>8.1} s  between the parts");
        }
        let _ = writeln!(text, "{:>8.1} s  all", self.seconds);
        let Some(trials) = &self.trials else {
            return text;
        };
        let Spent {
            host,
            guests,
            working,
            waiting,
            emulator,
            host_boots,
            guest_boots,
        } = self.causes;
        let _ = writeln!(
            text,
            "\nof the trials, of which {} ran at once:\n\
             {host:>8.1} s  {host_boots} boots of hosts\n{guests:>8.1} s  {guest_boots} boots of guests\n\
             {working:>8.1} s  work\n{waiting:>8.1} s  waiting\n\
             {emulator:>8.1} s  processor time of the emulators",
            trials.lanes
        );
        text
    }
}

/// The parts of a run; one that has several lines is their sum. Other lines are none.
fn parse(text: &str) -> Vec<Part> {
    let mut parts: Vec<Part> = Vec::new();
    for line in text.lines() {
        let row = line.split_once('\t');
        let row = row.and_then(|(name, seconds)| Some((name, seconds.trim().parse::<f64>().ok()?)));
        let Some((name, seconds)) = row else { continue };
        match parts.iter_mut().find(|part| part.name == name) {
            Some(part) => part.seconds += seconds,
            None => parts.push(Part {
                name: name.to_owned(),
                seconds,
            }),
        }
    }
    parts
}

/// A file's text; nothing if there is no file.
fn read(path: &Path) -> Result<String> {
    match fs::read_to_string(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(String::new()),
        text => text.with_context(|| format!("reading {}", path.display())),
    }
}

/// Prints the table, and a soak's numbers, and writes the JSON.
pub(crate) fn run(arguments: &TimesArgs) -> Result<()> {
    let folder = folder();
    let parts = env::var_os("BUSWAY_LAB_TIMES").map_or_else(|| folder.join("parts"), PathBuf::from);
    let trials = Trials::read(&folder.join("trials.json"))?;
    let times = Times::new(&read(&parts)?, trials);
    println!("{}", times.table());
    if let Some(trials) = times.trials.as_ref().filter(|trials| trials.soak) {
        print!("{}", trials.numbers());
    }
    if let Some(path) = &arguments.numbers {
        for line in read(path)?.lines() {
            println!("           {}", line.replace('\t', ": "));
        }
    }
    let path = folder.with_file_name("times.json");
    let text = serde_json::to_string_pretty(&times)? + "\n";
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = "build\t60.5\nset-up: the stock kernel\t15\nbuild\t1.5\nno part\nall\t80\n";

    #[test]
    fn lines_of_one_part_add_up_and_the_rest_is_between_them() {
        let times = Times::new(LINES, None);
        let parts: Vec<_> = times
            .parts
            .iter()
            .map(|part| (part.name.as_str(), part.seconds))
            .collect();
        assert_eq!(parts, [("build", 62.0), ("set-up: the stock kernel", 15.0)]);
        let table = times.table();
        assert!(table.contains("     3.0 s  between the parts\n    80.0 s  all\n"));
    }

    #[test]
    fn without_the_line_of_all_the_run_is_the_sum_of_its_parts() {
        assert_eq!(Times::new("build\t2\nlints\t3\n", None).seconds, 5.0);
    }

    #[test]
    fn tools_find_parts_causes_and_trials() {
        let text = serde_json::to_string(&Times::new(LINES, Some(Trials::default()))).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["parts"][0]["name"], "build");
        assert_eq!(value["seconds"], 80.0);
        assert!(value["causes"]["waiting"].is_number() && value["trials"]["trials"].is_array());
    }
}
