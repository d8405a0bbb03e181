//! What a run of the lab's trials came to, as the runner writes it to `target/times/trials.json` and prints it.

use std::collections::BTreeMap;
use std::env;
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::budgets::exceeds;
use crate::spent::Spent;

/// The folder of the times of the last run: `target/times`.
pub fn folder() -> PathBuf {
    // Cargo's own default, and what a relative folder begins at where cargo is called as the scripts do.
    let project = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let target = env::var_os("CARGO_TARGET_DIR").unwrap_or_else(|| "target".into());
    project.join(target).join("times")
}

/// One trial's run, all its attempts together.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrialRun {
    /// Its name.
    pub name: String,
    /// Whether its last attempt succeeded.
    pub passed: bool,
    /// First line of the failure.
    pub failure: Option<String>,
    /// Seconds of all attempts.
    pub seconds: f64,
    /// Seconds of the last attempt, which are what the budget limits.
    pub last: f64,
    /// Seconds that it may take, if `times.txt` has a row for it.
    pub budget: Option<u64>,
    /// Where all its seconds went.
    #[serde(flatten)]
    pub spent: Spent,
    /// First line of why it was begun anew, for each attempt but the last.
    pub begun_anew: Vec<String>,
    /// What it counted, by name: rounds, interrupts and the like.
    pub numbers: BTreeMap<String, u64>,
}

impl TrialRun {
    /// How often it was begun.
    pub fn attempts(&self) -> usize {
        self.begun_anew.len() + 1
    }
}

/// A run of trials.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Trials {
    /// Whether these are the long rounds of `scripts/test soak`. Budgets are those of the short ones.
    pub soak: bool,
    /// How many trials ran at once.
    pub lanes: usize,
    /// Seconds from the first trial's start to the last one's end.
    pub seconds: f64,
    /// Those that have ended.
    pub trials: Vec<TrialRun>,
}

type Column = (&'static str, fn(&Spent) -> f64);

/// The table's columns of seconds, after the first.
const CAUSES: [Column; 5] = [
    ("host", |spent| spent.host),
    ("guests", |spent| spent.guests),
    ("working", |spent| spent.working),
    ("waiting", |spent| spent.waiting),
    ("emulator", |spent| spent.emulator),
];

impl Trials {
    /// Reads what a run wrote; nothing if there was none.
    ///
    /// # Errors
    /// The file cannot be read, or something else wrote it.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        if !path.exists() {
            return Ok(None);
        }
        let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()));
        let trials = serde_json::from_str(&text?);
        Ok(Some(trials.with_context(|| {
            format!("{} is no run of trials", path.display())
        })?))
    }

    /// Writes it to `trials.json` in [`folder`].
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self) -> Result<()> {
        let folder = folder();
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join("trials.json");
        let text = serde_json::to_string_pretty(self)? + "\n";
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// The sum by cause over all trials.
    pub fn spent(&self) -> Spent {
        let spent = self.trials.iter().map(|trial| trial.spent);
        spent.fold(Spent::default(), Spent::and)
    }

    /// The table: trials by time, longest first, and their sum.
    pub fn table(&self) -> String {
        let mut trials: Vec<&TrialRun> = self.trials.iter().collect();
        trials.sort_by(|one, other| other.seconds.total_cmp(&one.seconds));
        let mut text = format!("{:>7}", "seconds");
        for (cause, _) in CAUSES {
            let _ = write!(text, " {cause:>8}");
        }
        text += " budget attempts  trial\n";
        let mut row = |seconds: f64, spent: &Spent, rest: &str| {
            let _ = write!(text, "{seconds:>7.0}");
            for (_, of) in CAUSES {
                let _ = write!(text, " {:>8.0}", of(spent));
            }
            text += rest;
        };
        for trial in trials {
            let budget = trial
                .budget
                .map_or("-".to_owned(), |budget| budget.to_string());
            let failed = if trial.passed { "" } else { " FAILED" };
            let rest = format!(
                " {budget:>6} {:>8}  {}{failed}\n",
                trial.attempts(),
                trial.name
            );
            row(trial.seconds, &trial.spent, &rest);
        }
        let sum = self.trials.iter().map(|trial| trial.seconds).sum();
        let attempts: usize = self.trials.iter().map(TrialRun::attempts).sum();
        let rest = format!(" {:>6} {attempts:>8}  all, in {} lanes\n", "", self.lanes);
        row(sum, &self.spent(), &rest);
        text
    }

    /// The trials that were begun anew, and why; one line if there were none.
    pub fn begun_anew(&self) -> String {
        let anew = self.trials.iter();
        let anew: Vec<_> = anew.filter(|trial| !trial.begun_anew.is_empty()).collect();
        let mut text = format!(
            "begun anew: {} of {} trials\n",
            anew.len(),
            self.trials.len()
        );
        for trial in anew {
            for reason in &trial.begun_anew {
                let _ = writeln!(text, "    {}: {reason}", trial.name);
            }
        }
        text
    }

    /// The trials that took much longer than their budgets, and those that have none.
    pub fn over_budget(&self) -> String {
        let mut text = String::new();
        for TrialRun {
            name, last, budget, ..
        } in &self.trials
        {
            let _ = match budget {
                Some(budget) if exceeds(*last, *budget) => writeln!(
                    text,
                    "over budget: {name} took {last:.0} s, and its row in tests/lab/times.txt says {budget}"
                ),
                Some(_) => Ok(()),
                None => writeln!(
                    text,
                    "no budget: {name} took {last:.0} s; `TIMES=overwrite scripts/lab test {name}` \
                     adds its row to tests/lab/times.txt"
                ),
            };
        }
        text
    }

    /// What each trial counted, and the seconds that it took for it: a soak's numbers.
    pub fn numbers(&self) -> String {
        let mut text = String::new();
        for trial in &self.trials {
            let outcome = if trial.passed { "passed" } else { "FAILED" };
            let _ = write!(text, "{:>7.0} s  {outcome}  {}:", trial.seconds, trial.name);
            for (name, number) in &trial.numbers {
                let _ = write!(text, " {name}={number}");
            }
            text.push('\n');
        }
        text
    }
}

/// The first line of an explanation: the rest is consoles.
pub fn first_line(text: &str) -> String {
    let line = text.lines().find(|line| !line.trim().is_empty());
    line.unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn trial(name: &str, seconds: f64, budget: Option<u64>) -> TrialRun {
        TrialRun {
            name: name.to_owned(),
            passed: true,
            failure: None,
            seconds,
            last: seconds,
            budget,
            spent: Spent {
                host: 2.0,
                guests: 10.0,
                working: seconds - 13.0,
                waiting: 1.0,
                emulator: 30.0,
                host_boots: 1,
                guest_boots: 2,
            },
            begun_anew: Vec::new(),
            numbers: BTreeMap::from([("rounds".to_owned(), 20)]),
        }
    }

    fn trials() -> Trials {
        let mut slow = trial("slow", 150.0, Some(60));
        slow.begun_anew.push("it hung".to_owned());
        Trials {
            soak: false,
            lanes: 2,
            seconds: 160.0,
            trials: vec![
                trial("quick", 20.0, Some(15)),
                slow,
                trial("new", 30.0, None),
            ],
        }
    }

    #[test]
    fn a_run_reads_as_it_was_written_and_causes_stand_beside_seconds() {
        let text = serde_json::to_string(&trials()).unwrap();
        assert_eq!(serde_json::from_str::<Trials>(&text).unwrap(), trials());
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["trials"][1]["guests"], 10.0);
        assert_eq!(value["trials"][1]["begun_anew"][0], "it hung");
    }

    #[test]
    fn the_table_is_by_time_and_ends_with_the_sum() {
        let table = trials().table();
        let rows: Vec<Vec<&str>> = table
            .lines()
            .map(|line| line.split_ascii_whitespace().collect())
            .collect();
        let names: Vec<_> = rows.iter().map(|row| row[row.len() - 1]).collect();
        assert_eq!(names, ["trial", "slow", "new", "quick", "lanes"]);
        assert_eq!(
            rows[1],
            ["150", "2", "10", "137", "1", "30", "60", "2", "slow"]
        );
        assert_eq!(rows[4][..7], ["200", "6", "30", "161", "3", "90", "4"]);
    }

    #[test]
    fn what_is_over_budget_without_one_or_begun_anew_is_named() {
        let said = trials().over_budget();
        assert!(said.contains("over budget: slow took 150 s") && said.contains("no budget: new"));
        assert!(!said.contains("quick"));
        let said = trials().begun_anew();
        assert_eq!(said, "begun anew: 1 of 3 trials\n    slow: it hung\n");
    }

    #[test]
    fn an_explanation_s_first_line_is_its_reason() {
        assert_eq!(first_line("\n it hung;\nconsole"), "it hung;");
        assert_eq!(first_line(""), "");
    }
}
