//! `busway device list --tree`: which device is behind which, with IOMMU groups in colour.

use std::fmt::Write as _;

use busway_host::MediatedDevice;

use super::facts::{Facts, is_lent};
use super::mediated;
use super::topology::{Node, Topology};
use crate::cli::style::{Screen, Style, of_palette};
use crate::cli::text::{fold, length, shorten};

/// A device's name is not cut shorter than this.
const NAME_LEAST: usize = 12;

/// A line of the tree before it is laid out.
struct Branch {
    /// The lines that lead here, and the address.
    stem: String,
    /// The same for what stands below the address.
    below: String,
    group: String,
    group_style: Style,
    driver: String,
    driver_style: Style,
    words: String,
    words_style: Style,
    uses: Vec<String>,
}

/// The tree, for a screen.
pub(super) fn show(facts: &Facts<'_>, topology: &Topology<'_>, screen: Screen) -> String {
    let mut text = String::new();
    let mut trees = Vec::new();
    for root in &topology.roots {
        let mut branches = Vec::new();
        add(facts, topology, &root.devices, &[], "", &mut branches);
        trees.push((root.name, root.node, branches));
    }
    for (parent, devices) in &topology.elsewhere {
        let mut branches = Vec::new();
        add(facts, topology, &[], devices, "", &mut branches);
        trees.push((parent, None, branches));
    }
    let all = trees.iter().flat_map(|(_, _, branches)| branches);
    let (mut stem, mut group, mut driver) = (0, 0, 0);
    for branch in all {
        stem = stem.max(length(&branch.stem));
        group = group.max(length(&branch.group));
        driver = driver.max(length(&branch.driver));
    }
    let limit = screen.width.unwrap_or(usize::MAX);
    let left = stem + group + driver + 6;
    let room = limit.saturating_sub(left).max(NAME_LEAST);
    for (root, node, branches) in &trees {
        let node = node.map(|node| format!("  NUMA node {node}"));
        let name = Style::BOLD.paint(root, screen.colour);
        let _infallible = writeln!(text, "{name}{}", node.unwrap_or_default());
        for branch in branches {
            let paint = |words: &str, style: Style, width: usize| {
                let pad = " ".repeat(width.saturating_sub(length(words)));
                format!("{}{pad}  ", style.paint(words, screen.colour))
            };
            let mut line = paint(&branch.stem, Style::PLAIN, stem);
            line += &paint(&branch.group, branch.group_style, group);
            line += &paint(&branch.driver, branch.driver_style, driver);
            let words = shorten(&branch.words, room);
            let _infallible = write!(line, "{}", branch.words_style.paint(words, screen.colour));
            let _infallible = writeln!(text, "{}", line.trim_end());
            if !branch.uses.is_empty() {
                let width = limit.saturating_sub(length(&branch.below) + 2);
                let uses = fold(&format!("used by {}", branch.uses.join(", ")), width);
                for (index, line) in uses.iter().enumerate() {
                    let before = if index == 0 { "" } else { "  " };
                    let _infallible = writeln!(text, "{}{before}{line}", branch.below);
                }
            }
        }
    }
    text
}

/// The lines of what is behind a device or on a root bus, and then of the mediated devices made of it.
fn add(
    facts: &Facts<'_>,
    topology: &Topology<'_>,
    nodes: &[Node<'_>],
    mediated: &[&MediatedDevice],
    prefix: &str,
    branches: &mut Vec<Branch>,
) {
    let count = nodes.len() + mediated.len();
    let lines = |index: usize| match index + 1 < count {
        true => ("├─ ", "│  "),
        false => ("└─ ", "   "),
    };
    for (index, node) in nodes.iter().enumerate() {
        let device = node.device;
        let (elbow, through) = lines(index);
        let inner = format!("{prefix}{through}");
        let more = match node.behind.is_empty() && node.mediated.is_empty() {
            true => "   ",
            false => "│  ",
        };
        let colour = topology.colour_of(device.group);
        branches.push(Branch {
            stem: format!("{prefix}{elbow}{}", device.address),
            below: format!("{inner}{more}"),
            group: group(device.group),
            group_style: colour.map_or(Style::PLAIN, of_palette),
            words: format!("{}: {}", facts.class(device), facts.name(device)),
            words_style: match device.is_bridge() {
                true => Style::DIM,
                false => Style::PLAIN,
            },
            uses: facts.uses(device),
            ..Branch::driven_by(device.driver.as_deref())
        });
        add(
            facts,
            topology,
            &node.behind,
            &node.mediated,
            &inner,
            branches,
        );
    }
    for (index, device) in (nodes.len()..).zip(mediated) {
        let (elbow, through) = lines(index);
        branches.push(Branch {
            stem: format!("{prefix}{elbow}{}", device.uuid),
            below: format!("{prefix}{through}   "),
            group: group(device.group),
            words: mediated::name(device),
            uses: mediated::users(device),
            ..Branch::driven_by(device.driver.as_deref())
        });
    }
}

fn group(group: Option<u32>) -> String {
    match group {
        Some(group) => format!("group {group}"),
        None => "no group".to_owned(),
    }
}

impl Branch {
    /// A line that says no more than whose the device is.
    fn driven_by(driver: Option<&str>) -> Self {
        Self {
            stem: String::new(),
            below: String::new(),
            group: String::new(),
            group_style: Style::PLAIN,
            driver: driver.unwrap_or("-").to_owned(),
            driver_style: match driver.is_some_and(is_lent) {
                true => Style::GOOD,
                false => Style::PLAIN,
            },
            words: String::new(),
            words_style: Style::PLAIN,
            uses: Vec::new(),
        }
    }
}
