//! `busway doctor`: the host in one page, by traffic lights.

use std::io::{self, Write};

use busway_host::{Finding, Level, Opens, SysRoot, examine, open_node};
use clap::Args;
use serde::Serialize;

use super::failure::Failure;
use super::findings::{self, FindingArgs};
use super::style::{Screen, Style, write_out};
use crate::exit::{HOST, RUNTIME};
use crate::preflight::{FindingJson, findings_json};

/// `busway doctor`
#[derive(Args, Clone, Debug)]
pub struct DoctorArgs {
    /// How it is looked over.
    #[command(flatten)]
    pub findings: FindingArgs,
}

#[derive(Serialize)]
struct Json<'a> {
    version: u32,
    healthy: bool,
    findings: Vec<FindingJson<'a>>,
}

/// Looks this host over.
pub(super) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let screen = Screen::of_stdout();
    match run_on(args, &SysRoot::default(), &open_node, &mut out, screen) {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::silent(HOST)),
        Err(error) => {
            let error = anyhow::Error::new(error).context("cannot write the result");
            Err(Failure::explained(RUNTIME, error))
        }
    }
}

/// Looks the host below `root` over, and writes what was found. Returns whether guests can be given
/// devices there.
///
/// # Errors
///
/// Where it cannot be written.
pub fn run_on(
    args: &DoctorArgs,
    root: &SysRoot,
    opens: Opens<'_>,
    out: &mut dyn Write,
    screen: impl Into<Screen>,
) -> io::Result<bool> {
    let screen = screen.into();
    let found = examine(root, args.findings.memory, opens);
    let healthy = busway_host::worst(&found) != Level::Obstacle;
    let text = if args.findings.json {
        let json = Json {
            version: 1,
            healthy,
            findings: findings_json(&found),
        };
        serde_json::to_string_pretty(&json)? + "\n"
    } else {
        findings::heading("This host", verdict(&found), screen) + &findings::show(&found, screen)
    };
    write_out(out, &text)?;
    Ok(healthy)
}

fn verdict(found: &[Finding]) -> (&'static str, Style) {
    let has = |level| found.iter().any(|finding| finding.level == level);
    if has(Level::Obstacle) {
        ("cannot give devices to guests", Style::BAD)
    } else if has(Level::Warning) {
        ("can give devices to guests, with warnings", Style::WARN)
    } else {
        ("can give devices to guests", Style::GOOD)
    }
}
