//! `docs/devices.md`: which device works by which way into VFIO. The lab's trials write it, and hold what
//! they see against it.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::works::{WORKS, Work};

/// The ways that the page has a column for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The IOMMU group and the type1 container, on an Intel IOMMU.
    Group,
    /// The device's own node and iommufd, on an Intel IOMMU.
    Cdev,
    /// The same on an AMD one.
    CdevAmd,
}

const WAYS: [Way; 3] = [Way::Group, Way::Cdev, Way::CdevAmd];

const PASSES: &str = "passes";
const FAILS: &str = "does not yet";
const UNTRIED: &str = "untried";

const HEAD: &str = "\
# Devices

What the lab has seen Busway give to a guest: each of these devices, in an emulated host, does its work there under its
own Linux driver (`edu` and `ivshmem`, which have none, under a program in the guest's user space), all of them in one
guest at the same time. The trials named `zoo_` write this page when `DEVICES=overwrite` is set, and otherwise fail
where it is not what they see.

";

/// The page's rows: what each way came to, by the works' order.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Page(Vec<[String; WAYS.len()]>);

impl Page {
    fn untried() -> Self {
        Self(
            WORKS
                .iter()
                .map(|_| WAYS.map(|_| UNTRIED.to_owned()))
                .collect(),
        )
    }

    /// Takes over what a page says of the devices that there are now.
    fn parse(text: &str) -> Self {
        let mut page = Self::untried();
        for line in text.lines() {
            let cells: Vec<&str> = line.split('|').map(str::trim).collect();
            let [_, device, _, _, group, cdev, amd, _] = cells[..] else {
                continue;
            };
            if let Some(at) = WORKS.iter().position(|work| work.device == device) {
                page.0[at] = [group, cdev, amd].map(str::to_owned);
            }
        }
        page
    }

    fn render(&self) -> String {
        let mut text = HEAD.to_owned();
        text += "| device | exercises | proof | by group | by cdev | by cdev, AMD IOMMU |\n";
        text += "|---|---|---|---|---|---|\n";
        for (work, cells) in WORKS.iter().zip(&self.0) {
            let Work {
                device,
                exercises,
                proof,
                ..
            } = work;
            text += &format!(
                "| {device} | {exercises} | {proof} | {} |\n",
                cells.join(" | ")
            );
        }
        text
    }
}

fn path() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/devices.md")
}

/// Holds what became of the works by one way against the page, or with `DEVICES=overwrite` writes it
/// there.
///
/// # Errors
/// The page says something else, or cannot be read or written.
pub fn record(way: Way, outcomes: &[(&Work, Result<()>)]) -> Result<()> {
    let path = path();
    let before = fs::read_to_string(&path).unwrap_or_default();
    let mut page = Page::parse(&before);
    let column = WAYS
        .iter()
        .position(|&each| each == way)
        .unwrap_or_default();
    let mut differences = Vec::new();
    for (work, outcome) in outcomes {
        let at = WORKS.iter().position(|each| each.device == work.device);
        let cell = &mut page.0[at.context("a work that is in no table")?][column];
        let seen = match outcome {
            Ok(()) => PASSES,
            Err(_) => FAILS,
        };
        if let Err(error) = outcome {
            println!("{}: {error:#}", work.device);
        }
        if cell != seen {
            let why = outcome.as_ref().err().map(|error| format!(" ({error:#})"));
            let why = why.unwrap_or_default();
            differences.push(format!(
                "{} by {way:?}: {seen}{why}; docs/devices.md says {cell}",
                work.device
            ));
            seen.clone_into(cell);
        }
    }
    if std::env::var("DEVICES").is_ok_and(|value| value == "overwrite") {
        return fs::write(&path, page.render())
            .with_context(|| format!("writing {}", path.display()));
    }
    ensure!(differences.is_empty(), "{}", differences.join("\n"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_page_has_the_devices_that_the_trials_try() {
        let text = fs::read_to_string(path()).unwrap();
        assert_eq!(
            text,
            Page::parse(&text).render(),
            "run the zoo's trials with DEVICES=overwrite"
        );
    }

    #[test]
    fn a_page_reads_as_it_was_written() {
        let mut page = Page::untried();
        page.0[1][2] = PASSES.to_owned();
        page.0[3][0] = FAILS.to_owned();
        assert_eq!(Page::parse(&page.render()), page);
    }
}
