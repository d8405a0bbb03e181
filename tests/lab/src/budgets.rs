//! `tests/lab/times.txt`: what each trial of the lab may take. Trials start in its order, longest first, so that no
//! long one is left when the others are done.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const HEAD: &str = "\
# Seconds that each trial of the lab takes, its host's and guests' boots included, longest first: the order in which
# trials start, and a trial's budget. A trial that takes more than twice its seconds, and 20 more, is reported.
# `TIMES=overwrite scripts/test` writes this file, as does `TIMES=overwrite scripts/lab test NAME` for some rows.
";

/// How far beyond twice its budget a short trial may go: the machine below is not always its own.
const GRACE: u64 = 20;

/// The table, by time, longest first.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Budgets(Vec<(u64, String)>);

impl Budgets {
    fn path() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("times.txt")
    }

    /// The repository's table.
    ///
    /// # Errors
    /// It cannot be read, or a line is neither `SECONDS NAME` nor a comment.
    pub fn read() -> Result<Self> {
        let path = Self::path();
        let text = fs::read_to_string(&path);
        let text = text.with_context(|| format!("reading {}", path.display()))?;
        Self::parse(&text).with_context(|| format!("in {}", path.display()))
    }

    /// Makes this the repository's table.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self) -> Result<()> {
        let path = Self::path();
        fs::write(&path, self.render()).with_context(|| format!("writing {}", path.display()))
    }

    fn parse(text: &str) -> Result<Self> {
        let mut rows = Vec::new();
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let row = line.trim().split_once(' ');
            let row = row.and_then(|(seconds, name)| Some((seconds.parse().ok()?, name.trim())));
            let (seconds, name) = row.with_context(|| format!("no `SECONDS NAME`: {line:?}"))?;
            ensure!(
                rows.iter().all(|(_, other)| other != name),
                "two rows are named {name}"
            );
            rows.push((seconds, name.to_owned()));
        }
        Ok(Self(rows).sorted())
    }

    fn render(&self) -> String {
        let rows = self.0.iter();
        let rows: String = rows
            .map(|row| format!("{:>4} {}\n", row.0, row.1))
            .collect();
        format!("{HEAD}{rows}")
    }

    fn sorted(mut self) -> Self {
        self.0
            .sort_by(|one, other| (Reverse(one.0), &one.1).cmp(&(Reverse(other.0), &other.1)));
        self
    }

    /// The seconds that a trial may take.
    pub fn of(&self, name: &str) -> Option<u64> {
        let row = self.0.iter().find(|(_, known)| known == name)?;
        Some(row.0)
    }

    /// Sorts trials longest first. Those that have no row come before all others, for they may be long.
    pub fn sort<T>(&self, trials: &mut [T], name: impl Fn(&T) -> &str) {
        trials.sort_by_key(|trial| Reverse(self.of(name(trial)).unwrap_or(u64::MAX)));
    }

    /// The rows of trials that are not among these.
    pub fn gone(&self, trials: &[&str]) -> Vec<&str> {
        let names = self.0.iter().map(|(_, name)| name.as_str());
        names.filter(|name| !trials.contains(name)).collect()
    }

    /// The table with new rows for the trials that took these seconds, and without the rows of trials that are gone.
    pub fn with(&self, took: &[(&str, f64)], trials: &[&str]) -> Self {
        let ran = |name: &str| took.iter().any(|(other, _)| *other == name);
        let kept = self.0.iter();
        let kept = kept.filter(|(_, name)| trials.contains(&name.as_str()) && !ran(name));
        let new = took
            .iter()
            .map(|(name, seconds)| (whole(*seconds), (*name).to_owned()));
        Self(kept.cloned().chain(new).collect()).sorted()
    }
}

/// Seconds as the table has them: whole ones, and at least one.
pub fn whole(seconds: f64) -> u64 {
    (seconds.ceil() as u64).max(1)
}

/// Whether a trial took so much longer than its budget that it is reported.
pub fn exceeds(seconds: f64, budget: u64) -> bool {
    seconds > (2 * budget) as f64 && seconds > (budget + GRACE) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Budgets {
        Budgets::parse("# head\n  7 short\n 60 b_long\n60 a_long\n").unwrap()
    }

    #[test]
    fn a_table_is_sorted_and_reads_as_it_was_written() {
        let text = table().render();
        assert!(text.ends_with("\n  60 a_long\n  60 b_long\n   7 short\n"));
        assert_eq!(Budgets::parse(&text).unwrap(), table());
    }

    #[test]
    fn a_line_that_is_no_row_and_a_second_row_are_errors() {
        for text in ["seven short\n", "7\n", "7 a\n8 a\n"] {
            assert!(Budgets::parse(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn the_repository_s_table_is_one_and_as_it_would_be_written() {
        let text = fs::read_to_string(Budgets::path()).unwrap();
        assert_eq!(Budgets::parse(&text).unwrap().render(), text);
    }

    #[test]
    fn trials_start_longest_first_and_unknown_ones_before() {
        let mut trials = ["short", "a_long", "new", "b_long"];
        table().sort(&mut trials, |name| name);
        assert_eq!(trials, ["new", "a_long", "b_long", "short"]);
    }

    #[test]
    fn twice_the_budget_and_twenty_seconds_more_are_too_many() {
        assert!(!exceeds(20.0, 1));
        assert!(exceeds(21.5, 1));
        assert!(!exceeds(120.0, 60));
        assert!(exceeds(121.0, 60));
    }

    #[test]
    fn rows_of_trials_that_did_not_run_are_kept_and_of_those_that_are_gone_are_not() {
        let trials = ["short", "b_long", "new"];
        assert_eq!(table().gone(&trials), ["a_long"]);
        let after = table().with(&[("short", 90.2), ("new", 0.1)], &trials);
        let rows: Vec<_> = after
            .0
            .iter()
            .map(|(s, name)| (*s, name.as_str()))
            .collect();
        assert_eq!(rows, [(91, "short"), (60, "b_long"), (1, "new")]);
    }
}
