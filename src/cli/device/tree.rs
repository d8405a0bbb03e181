//! `busway device list --tree`: which device is behind which, with IOMMU groups in colour.

use std::fmt::Write as _;

use super::facts::{Facts, is_lent};
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
        add(facts, topology, &root.devices, "", &mut branches);
        trees.push((root, branches));
    }
    let all = trees.iter().flat_map(|(_, branches)| branches);
    let (mut stem, mut group, mut driver) = (0, 0, 0);
    for branch in all {
        stem = stem.max(length(&branch.stem));
        group = group.max(length(&branch.group));
        driver = driver.max(length(&branch.driver));
    }
    let limit = screen.width.unwrap_or(usize::MAX);
    let left = stem + group + driver + 6;
    let room = limit.saturating_sub(left).max(NAME_LEAST);
    for (root, branches) in &trees {
        let node = root.node.map(|node| format!("  NUMA node {node}"));
        let name = Style::BOLD.paint(root.name, screen.colour);
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

fn add(
    facts: &Facts<'_>,
    topology: &Topology<'_>,
    nodes: &[Node<'_>],
    prefix: &str,
    branches: &mut Vec<Branch>,
) {
    for (index, node) in nodes.iter().enumerate() {
        let device = node.device;
        let (elbow, through) = match index + 1 < nodes.len() {
            true => ("├─ ", "│  "),
            false => ("└─ ", "   "),
        };
        let inner = format!("{prefix}{through}");
        let more = if node.behind.is_empty() {
            "   "
        } else {
            "│  "
        };
        let driver = device.driver.as_deref();
        let colour = topology.colour_of(device.group);
        branches.push(Branch {
            stem: format!("{prefix}{elbow}{}", device.address),
            below: format!("{inner}{more}"),
            group: match device.group {
                Some(group) => format!("group {group}"),
                None => "no group".to_owned(),
            },
            group_style: colour.map_or(Style::PLAIN, of_palette),
            driver: driver.unwrap_or("-").to_owned(),
            driver_style: match driver.is_some_and(is_lent) {
                true => Style::GOOD,
                false => Style::PLAIN,
            },
            words: format!("{}: {}", facts.class(device), facts.name(device)),
            words_style: match device.is_bridge() {
                true => Style::DIM,
                false => Style::PLAIN,
            },
            uses: facts.uses(device),
        });
        add(facts, topology, &node.behind, &inner, branches);
    }
}
