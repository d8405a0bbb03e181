//! Findings of the host's side as a person reads them, and as JSON.

use std::fmt::Write as _;

use busway_host::{Finding, Level};
use busway_iommu::printable;
use clap::Args;

use super::style::{Screen, Style};
use super::text::{fold, shorten};
use super::value::Value;
use crate::preflight::{FindingJson, RemedyJson, findings_json};

/// Where the words of a finding begin: after its level and its topic.
const INDENT: usize = 19;

/// For what guest a host is looked over, and how that is told.
#[derive(Args, Clone, Copy, Debug)]
pub struct FindingArgs {
    /// How much memory the guest has, all of which is locked
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory)]
    pub memory: u64,

    /// Print JSON, whose schema docs/device-json.md describes
    #[arg(long)]
    pub json: bool,
}

/// Bytes, as the flags of a guest say them.
fn memory(text: &str) -> Result<u64, String> {
    let value = Value::Text(text.to_owned());
    value.size().map_err(|reason| reason.to_string())
}

/// Whether a guest can have a device, in words.
pub(super) fn verdict(ready: bool, needs_only_binding: bool) -> (&'static str, Style) {
    match (ready, needs_only_binding) {
        (true, _) => ("ready", Style::GOOD),
        (false, true) => ("ready to be bound", Style::WARN),
        (false, false) => ("not ready", Style::BAD),
    }
}

/// Whether a host can give devices to guests, in words.
pub(super) fn host_verdict(findings: &[FindingJson<'_>]) -> (&'static str, Style) {
    let bad = |finding: &FindingJson<'_>| finding.level() == Level::Obstacle;
    match findings.iter().any(bad) {
        true => ("cannot give devices to guests", Style::BAD),
        false => ("can give devices to guests", Style::GOOD),
    }
}

/// What is looked at, and what came of it.
pub(super) fn heading(what: &str, (verdict, style): (&str, Style), screen: Screen) -> String {
    let what = what.trim_end();
    let room = screen
        .width
        .map(|width| width.saturating_sub(verdict.len() + 2));
    let what = room.map_or_else(|| what.to_owned(), |room| shorten(what, room));
    let what = Style::BOLD.paint(what, screen.colour);
    format!("{what}: {}\n", style.paint(verdict, screen.colour))
}

/// A line for each finding, its level in words and in colour, and its remedies below it. Commands stand on
/// lines of their own, and are never cut.
pub(super) fn show(findings: &[Finding], screen: Screen) -> String {
    show_json(&findings_json(findings), screen)
}

/// The same of what was written before. No word of it steers a terminal.
pub(super) fn show_json(findings: &[FindingJson<'_>], screen: Screen) -> String {
    let mut text = String::new();
    let width = screen.width.unwrap_or(usize::MAX).saturating_sub(INDENT);
    let mut last = "";
    for finding in findings {
        let (word, style) = match finding.level() {
            Level::Fine => ("ok", Style::GOOD),
            Level::Note => ("note", Style::PLAIN),
            Level::Warning => ("warn", Style::WARN),
            Level::Obstacle => ("FAIL", Style::BAD),
        };
        let topic = match finding.topic == last {
            true => String::new(),
            false => printable(&finding.topic),
        };
        last = &*finding.topic;
        for (index, line) in fold(&printable(&finding.text), width)
            .into_iter()
            .enumerate()
        {
            let _infallible = match index {
                0 => {
                    let word = style.paint(format!("{word:<5}"), screen.colour);
                    writeln!(text, "  {word} {topic:<10} {line}")
                }
                _ => writeln!(text, "{:INDENT$}{line}", ""),
            };
        }
        for RemedyJson { what, command } in &finding.remedies {
            let colon = if command.is_some() { ":" } else { "" };
            let lines = fold(&format!("→ {}{colon}", printable(what)), width);
            for (index, line) in lines.into_iter().enumerate() {
                let before = if index == 0 { "" } else { "  " };
                let _infallible = writeln!(text, "{:INDENT$}{before}{line}", "");
            }
            if let Some(command) = command {
                let command = Style::COMMAND.paint(printable(command), screen.colour);
                let _infallible = writeln!(text, "{:INDENT$}  {command}", "");
            }
        }
    }
    text
}
