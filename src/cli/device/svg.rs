//! `busway device list --svg`: the topology as a picture, root buses on the left, devices on the right.
//!
//! Groups that several devices are in have a colour each; a picture follows the viewer's choice of
//! light or dark. Nothing is fetched from anywhere, so that it can stand in a wiki as it is.

use std::fmt::{self, Write as _};

use busway_host::{HostDevice, MediatedDevice};

use super::facts::{self, Facts, is_lent};
use super::mediated;
use super::topology::{Node, Topology};
use crate::cli::style::PALETTE;
use crate::cli::text::shorten;

/// All lengths are in the picture's own units: pixels at its natural size.
const MARGIN: usize = 24;
const HEAD: usize = 56;
/// From one device to the next below it.
const STEP: usize = 58;
const HEIGHT: usize = 48;
const ROOT_WIDTH: usize = 132;
const BRIDGE_WIDTH: usize = 196;
const DEVICE_WIDTH: usize = 560;
/// From one bus to the next.
const GAP: usize = 36;
const LEGEND: usize = 26;

const STYLE: &str = "\
svg{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',Verdana,sans-serif}\
.page{fill:#fbfbfd}.card{fill:#fff;stroke:#c9ced6}.bridge{fill:#f1f3f6}.root{fill:#e4e8ee}\
.wire{fill:none;stroke:#a9b1bd;stroke-width:1.5}\
text{fill:#1c2330;font-size:12px}.head{font-size:18px;font-weight:600}\
.address{font-family:ui-monospace,'Cascadia Mono','DejaVu Sans Mono',monospace;font-weight:600}\
.small{font-size:11px;fill:#566072}.used{font-size:11px;fill:#9a3412}.lent{font-size:11px;fill:#15803d;font-weight:600}\
.group{font-size:11px;fill:#fff;font-weight:600;text-anchor:middle}.alone{fill:#566072}\
.pill{fill:none;stroke:#c9ced6}\
@media(prefers-color-scheme:dark){\
.page{fill:#14181f}.card{fill:#1e242d;stroke:#3c4654}.bridge{fill:#252c37}.root{fill:#2d3644}\
.wire{stroke:#5b6676}text{fill:#e8ecf2}.small,.alone{fill:#a7b1c0}.used{fill:#fdba74}.lent{fill:#4ade80}\
.group{fill:#fff}.alone{fill:#a7b1c0}.pill{stroke:#4a5565}}";

/// The picture.
pub(super) fn show(facts: &Facts<'_>, topology: &Topology<'_>, title: &str) -> String {
    let mut picture = Picture {
        facts,
        topology,
        body: String::new(),
        wires: String::new(),
        row: 0,
        right: MARGIN + ROOT_WIDTH,
    };
    for root in &topology.roots {
        let first = picture.row;
        let mut ends = Vec::new();
        let left = MARGIN + ROOT_WIDTH + GAP;
        for node in &root.devices {
            ends.push((left, picture.node(node, left)));
        }
        picture.row = picture.row.max(first + 1);
        let middle = middle_of(&ends, first);
        picture.root(root.name, root.node, middle);
        picture.wire(MARGIN + ROOT_WIDTH, middle, &ends);
    }
    for (parent, devices) in &topology.elsewhere {
        let first = picture.row;
        let ends = picture.mediated(devices, MARGIN + ROOT_WIDTH + GAP);
        let middle = middle_of(&ends, first);
        picture.box_of(parent, "no PCI device", middle);
        picture.wire(MARGIN + ROOT_WIDTH, middle, &ends);
    }
    picture.finish(title)
}

/// What a device's box says.
struct Card {
    /// Its address, or its UUID.
    id: String,
    /// How much room that takes, and how long what stands beside it may be.
    id_width: usize,
    name_length: usize,
    name: String,
    driver: String,
    link: String,
    group: Option<u32>,
    /// That of the group, where several devices are in it.
    colour: Option<usize>,
    uses: Vec<String>,
    is_bridge: bool,
}

impl Card {
    fn of(facts: &Facts<'_>, topology: &Topology<'_>, device: &HostDevice) -> Self {
        Self {
            id: device.address.to_string(),
            id_width: 108,
            name_length: 50,
            name: format!("{}: {}", facts.class(device), facts.name(device)),
            link: facts::link(device),
            colour: topology.colour_of(device.group),
            uses: facts.uses(device),
            is_bridge: device.is_bridge(),
            ..Self::driven_by(device.driver.as_deref(), device.group)
        }
    }

    fn made(device: &MediatedDevice) -> Self {
        Self {
            id: device.uuid.to_string(),
            id_width: 276,
            name_length: 24,
            name: mediated::name(device),
            uses: mediated::users(device),
            ..Self::driven_by(device.driver.as_deref(), device.group)
        }
    }

    fn driven_by(driver: Option<&str>, group: Option<u32>) -> Self {
        Self {
            id: String::new(),
            id_width: 0,
            name_length: 0,
            name: String::new(),
            driver: driver.unwrap_or("no driver").to_owned(),
            link: String::new(),
            group,
            colour: None,
            uses: Vec::new(),
            is_bridge: false,
        }
    }
}

struct Picture<'a> {
    facts: &'a Facts<'a>,
    topology: &'a Topology<'a>,
    body: String,
    wires: String,
    /// How many lines of devices there are so far.
    row: usize,
    right: usize,
}

/// The middle of what is joined to something, by the places of the first and the last.
fn middle_of(ends: &[(usize, usize)], row: usize) -> usize {
    match (ends.first(), ends.last()) {
        (Some((_, first)), Some((_, last))) => (first + last) / 2,
        _ => HEAD + row * STEP + HEIGHT / 2,
    }
}

impl Picture<'_> {
    /// Draws a device, what is behind it and what is made of it. Returns the height of its middle.
    fn node(&mut self, node: &Node<'_>, left: usize) -> usize {
        let slim = node.device.is_bridge() && !node.behind.is_empty();
        let width = if slim { BRIDGE_WIDTH } else { DEVICE_WIDTH };
        let card = Card::of(self.facts, self.topology, node.device);
        self.right = self.right.max(left + width);
        if node.behind.is_empty() && node.mediated.is_empty() {
            let middle = self.next_middle();
            self.card(&card, left, width, middle);
            return middle;
        }
        let row = self.row;
        let next = left + width + GAP;
        let mut ends = Vec::new();
        for child in &node.behind {
            ends.push((next, self.node(child, next)));
        }
        ends.extend(self.mediated(&node.mediated, next));
        let middle = middle_of(&ends, row);
        self.card(&card, left, width, middle);
        self.wire(left + width, middle, &ends);
        middle
    }

    /// Draws mediated devices. Returns where each of them is.
    fn mediated(&mut self, devices: &[&MediatedDevice], left: usize) -> Vec<(usize, usize)> {
        let mut ends = Vec::new();
        for device in devices {
            let middle = self.next_middle();
            self.right = self.right.max(left + DEVICE_WIDTH);
            self.card(&Card::made(device), left, DEVICE_WIDTH, middle);
            ends.push((left, middle));
        }
        ends
    }

    /// The middle of the next line of devices, which is taken.
    fn next_middle(&mut self) -> usize {
        let middle = HEAD + self.row * STEP + HEIGHT / 2;
        self.row += 1;
        middle
    }

    fn root(&mut self, name: &str, node: Option<u32>, middle: usize) {
        let words = match node {
            Some(node) => format!("NUMA node {node}"),
            None => "root bus".to_owned(),
        };
        self.box_of(name, &words, middle);
    }

    /// What is on the left, with a word on what it is.
    fn box_of(&mut self, name: &str, words: &str, middle: usize) {
        let top = middle - HEIGHT / 2;
        let text = MARGIN + 12;
        self.put(format_args!(
            "<rect class=\"card root\" x=\"{MARGIN}\" y=\"{top}\" width=\"{ROOT_WIDTH}\" \
             height=\"{HEIGHT}\" rx=\"8\"/>\
             <text class=\"address\" x=\"{text}\" y=\"{}\">{}</text>",
            top + 20,
            Escaped(&shorten(name, 14))
        ));
        self.put(format_args!(
            "<text class=\"small\" x=\"{text}\" y=\"{}\">{words}</text>\n",
            top + 37
        ));
    }

    /// A device in its box: what it is on the first line, what has it on the second.
    fn card(&mut self, card: &Card, left: usize, width: usize, middle: usize) {
        let top = middle - HEIGHT / 2;
        let slim = width == BRIDGE_WIDTH;
        let kind = if card.is_bridge { " bridge" } else { "" };
        self.put(format_args!(
            "<g><title>{} {}",
            card.id,
            Escaped(&card.name)
        ));
        for usage in &card.uses {
            self.put(format_args!("\nused by {}", Escaped(usage)));
        }
        self.put(format_args!(
            "</title><rect class=\"card{kind}\" x=\"{left}\" y=\"{top}\" width=\"{width}\" \
             height=\"{HEIGHT}\" rx=\"8\"/>"
        ));
        if let Some(colour) = card.colour {
            self.put(format_args!(
                "<rect x=\"{left}\" y=\"{}\" width=\"5\" height=\"{}\" rx=\"2.5\" fill=\"{}\"/>",
                top + 6,
                HEIGHT - 12,
                Fill(colour)
            ));
        }
        self.pill(card, left + width - 10, top);
        let text = left + 14;
        self.put(format_args!(
            "<text class=\"address\" x=\"{text}\" y=\"{}\">{}</text>",
            top + 20,
            card.id
        ));
        let mut second = text;
        let driver = card.driver.as_str();
        let class = match is_lent(driver) {
            true => "lent",
            false => "small",
        };
        let driver = shorten(driver, 20);
        self.put(format_args!(
            "<text class=\"{class}\" x=\"{second}\" y=\"{}\">{}</text>",
            top + 37,
            Escaped(&driver)
        ));
        if !slim {
            self.put(format_args!(
                "<text x=\"{}\" y=\"{}\">{}</text>",
                text + card.id_width,
                top + 20,
                Escaped(&shorten(&card.name, card.name_length))
            ));
            second += 108;
        } else {
            second += 82;
        }
        if !card.link.is_empty() {
            self.put(format_args!(
                "<text class=\"small\" x=\"{second}\" y=\"{}\">{}</text>",
                top + 37,
                card.link
            ));
            second += 12 + 7 * card.link.chars().count();
        }
        if !card.uses.is_empty() && !slim {
            let room = (left + width).saturating_sub(second + 16) * 10 / 64;
            let words = shorten(&card.uses.join(", "), room);
            self.put(format_args!(
                "<text class=\"used\" x=\"{second}\" y=\"{}\">{}</text>",
                top + 37,
                Escaped(&words)
            ));
        }
        self.put(format_args!("</g>\n"));
    }

    /// A device's group, its right end at `right`.
    fn pill(&mut self, card: &Card, right: usize, top: usize) {
        let Some(group) = card.group else {
            return;
        };
        let text = format!("group {group}");
        let width = 12 + 13 * text.len() / 2;
        let left = right.saturating_sub(width);
        let (rect, class) = match card.colour {
            Some(colour) => (format!("fill=\"{}\"", Fill(colour)), "group"),
            None => ("class=\"pill\"".to_owned(), "group alone"),
        };
        self.put(format_args!(
            "<rect {rect} x=\"{left}\" y=\"{}\" width=\"{width}\" height=\"17\" rx=\"8.5\"/>\
             <text class=\"{class}\" x=\"{}\" y=\"{}\">{text}</text>",
            top + 7,
            left + width / 2,
            top + 19
        ));
    }

    /// Lines from the right of a box to the left of each of those behind it.
    fn wire(&mut self, from: usize, middle: usize, ends: &[(usize, usize)]) {
        for &(left, end) in ends {
            let bend = from + (left - from) / 2;
            let _infallible = writeln!(
                self.wires,
                "<path class=\"wire\" d=\"M{from} {middle}H{bend}V{end}H{left}\"/>"
            );
        }
    }

    fn finish(mut self, title: &str) -> String {
        let mut bottom = HEAD + self.row.max(1) * STEP + 6;
        let shared = self.topology.shared.clone();
        for (colour, group) in shared.iter().enumerate() {
            let members: Vec<_> = self.facts.host.group(*group).collect();
            let bridges = members.iter().filter(|member| member.is_bridge()).count();
            let ports = match bridges {
                0 => String::new(),
                1 => ", beside 1 bridge".to_owned(),
                more => format!(", beside {more} bridges"),
            };
            let devices = members.len() - bridges;
            let together = match devices {
                1 => "device, which goes to a guest",
                _ => "devices, which go to a guest together",
            };
            self.put(format_args!(
                "<rect fill=\"{}\" x=\"{MARGIN}\" y=\"{bottom}\" width=\"14\" height=\"14\" rx=\"4\"/>\
                 <text class=\"small\" x=\"{}\" y=\"{}\">IOMMU group {group}: {devices} \
                 {together}{ports}</text>\n",
                Fill(colour),
                MARGIN + 22,
                bottom + 11
            ));
            bottom += LEGEND;
        }
        self.put(format_args!(
            "<text class=\"small\" x=\"{MARGIN}\" y=\"{}\">Links: speed in GT/s and lanes, as they \
             run / at most. In orange: what uses a device; green: lent to user space by VFIO.</text>\n",
            bottom + 11
        ));
        bottom += LEGEND;
        let (width, height) = (self.right + MARGIN, bottom + MARGIN / 2);
        format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" role=\"img\">\n\
             <title>{title}</title>\n<style>{STYLE}</style>\n\
             <rect class=\"page\" width=\"{width}\" height=\"{height}\" rx=\"12\"/>\n\
             <text class=\"head\" x=\"{MARGIN}\" y=\"34\">{title}</text>\n{}{}</svg>\n",
            self.wires,
            self.body,
            title = Escaped(title),
        )
    }

    fn put(&mut self, text: fmt::Arguments<'_>) {
        let _infallible = self.body.write_fmt(text);
    }
}

/// A colour of the palette.
struct Fill(usize);

impl fmt::Display for Fill {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (_, [r, g, b]) = PALETTE[self.0 % PALETTE.len()];
        write!(f, "#{r:02x}{g:02x}{b:02x}")
    }
}

/// Text as XML has it. What XML cannot hold (XML 1.0 §2.2) is left out.
struct Escaped<'a>(&'a str);

impl fmt::Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in self.0.chars() {
            match c {
                '&' => f.write_str("&amp;")?,
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '"' => f.write_str("&quot;")?,
                c if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') => {}
                c => f.write_char(c)?,
            }
        }
        Ok(())
    }
}
