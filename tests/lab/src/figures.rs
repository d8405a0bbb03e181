//! The benchmark's table: which figures of its turns are held against what, and whether they hold.

use std::collections::BTreeSet;
use std::fmt;

use crate::bench::{ANOTHER, Beyond, MEMORY_MIB, Turn};

/// A figure of a turn, how it is printed, and what Busway's median has to be.
struct Figure {
    name: &'static str,
    /// Nothing where the turn did not measure it.
    of: fn(&Turn) -> Option<f64>,
    decimals: usize,
    wanted: Wanted,
}

pub(crate) enum Wanted {
    /// It is the drive's affair, not the VMM's.
    Nothing,
    /// At least this much of QEMU's.
    RatioFrom(f64),
    /// At most this much of QEMU's.
    RatioTo(f64),
    /// At most this.
    To(f64),
}

impl Wanted {
    /// What is wanted beside another Busway: what was to be less than QEMU's is to be no more than its, or hardly.
    fn beside(&self, other: &str) -> Self {
        match *self {
            Self::RatioTo(_) if other == ANOTHER => Self::RatioTo(1.02),
            Self::RatioTo(limit) => Self::RatioTo(limit),
            Self::RatioFrom(limit) => Self::RatioFrom(limit),
            Self::To(limit) => Self::To(limit),
            Self::Nothing => Self::Nothing,
        }
    }

    /// By the ratio as it is printed.
    pub(crate) fn holds(&self, ours: f64, theirs: f64) -> bool {
        let ratio = (ours / theirs * 100.0).round() / 100.0;
        match self {
            Self::Nothing => true,
            Self::RatioFrom(limit) => ratio >= *limit,
            Self::RatioTo(limit) => ratio <= *limit,
            Self::To(limit) => ours <= *limit,
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("-"),
            Self::RatioFrom(limit) => write!(f, "ratio >= {limit}"),
            Self::RatioTo(limit) => write!(f, "ratio <= {limit}"),
            Self::To(limit) => write!(f, "<= {limit}"),
        }
    }
}

/// No more than QEMU's. The same KVM makes the exits of both, so equal is what they are at best, and which of two equal
/// medians is the lower one is chance: see [`verdict`].
pub(crate) const NO_MORE: Wanted = Wanted::RatioTo(1.0);

const FIGURES: &[Figure] = &[
    Figure {
        name: "4 KiB random reads a second",
        of: |turn| Some(turn.reads_per_second),
        decimals: 0,
        wanted: Wanted::RatioFrom(0.95),
    },
    Figure {
        name: "  interrupts a read",
        of: |turn| Some(turn.interrupts_per_read),
        decimals: 3,
        wanted: Wanted::Nothing,
    },
    Figure {
        name: "  exits a read",
        of: |turn| Some(turn.exits_per_read),
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "exits a second without reads",
        of: |turn| beyond(turn, |beyond| beyond.exits_per_second),
        decimals: 0,
        wanted: Wanted::Nothing,
    },
    Figure {
        name: "beyond these, exits an interrupt",
        of: |turn| beyond(turn, |beyond| beyond.exits_per_interrupt),
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "  a read, 16 asked for at once",
        of: |turn| beyond(turn, |beyond| beyond.exits_per_read_of_many),
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "  a read, one at a time",
        of: |turn| beyond(turn, |beyond| beyond.exits_per_lone_read),
        decimals: 3,
        wanted: NO_MORE,
    },
    Figure {
        name: "MMIO exits to user space a read",
        of: |turn| Some(turn.mmio_exits_per_read),
        decimals: 3,
        wanted: Wanted::To(0.0),
    },
    Figure {
        name: "exec to guest user space, ms",
        of: |turn| beyond(turn, |beyond| beyond.boot_ms),
        decimals: 0,
        wanted: Wanted::RatioTo(0.6),
    },
    Figure {
        name: "  by OVMF, ms",
        of: |turn| {
            turn.beyond
                .as_ref()
                .and_then(|beyond| beyond.firmware_boot_ms)
        },
        decimals: 0,
        wanted: NO_MORE,
    },
    Figure {
        name: "own memory (PSS), KiB",
        of: |turn| Some(turn.own_pss_kib),
        decimals: 0,
        wanted: Wanted::To(4.0 * 1024.0),
    },
    Figure {
        name: "  of that dirty, KiB",
        of: |turn| Some(turn.own_dirty_kib),
        decimals: 0,
        wanted: NO_MORE,
    },
];

/// What is said of a figure that held in some of its turns, and by its median or not.
///
/// A limit of Busway's own is met or missed. A figure that lies exactly at a limit by QEMU's holds in each turn with a
/// chance of a half, so it is missed only where it held in so few turns that such a one does in less than one run of
/// twenty (the sign test), which takes five turns at least.
pub(crate) fn verdict(wanted: &Wanted, by_median: bool, held: u32, turns: u32) -> &'static str {
    let mut ways = 1.0; // of holding in exactly this many turns
    let mut at_most = 1.0;
    for so_many in 1..=held {
        ways *= f64::from(turns + 1 - so_many) / f64::from(so_many);
        at_most += ways;
    }
    match by_median {
        true => "",
        false if matches!(wanted, Wanted::To(_)) => "  MISSED",
        false if at_most / 2_f64.powi(turns as i32) < 0.05 => "  MISSED",
        false => "  within noise",
    }
}

fn beyond(turn: &Turn, of: fn(&Beyond) -> f64) -> Option<f64> {
    turn.beyond.as_ref().map(of)
}

fn spread(turns: &[Turn], vmm: &str, of: fn(&Turn) -> Option<f64>) -> (f64, f64, f64) {
    let turns = turns.iter().filter(|turn| turn.vmm == vmm);
    median_and_spread(turns.filter_map(of).collect())
}

/// Median, least and most.
pub(crate) fn median_and_spread(mut figures: Vec<f64>) -> (f64, f64, f64) {
    figures.sort_by(f64::total_cmp);
    let (least, most) = (figures[0], figures[figures.len() - 1]);
    (median(figures), least, most)
}

/// The table of the turns of Busway and `other`, which took turns with guests alike; `title` says which other it was.
pub(crate) fn print(turns: &[Turn], other: &str, title: &str) {
    let Some(first) = turns.first() else {
        return;
    };
    let number = turns.len() as u32 / 2;
    println!(
        "\nan NVMe drive assigned to a guest of {} vCPU and {MEMORY_MIB} MiB; median (least..most) of {number} turns",
        first.cpus
    );
    println!(
        "{:<34} {:>24} {title:>24} {:>7}  wanted (held in)",
        "", "Busway", "ratio"
    );
    let measured = |figure: &&Figure| (figure.of)(first).is_some();
    for figure in FIGURES.iter().filter(measured) {
        let decimals = figure.decimals;
        let wanted = figure.wanted.beside(other);
        let (ours, least, most) = spread(turns, "busway", figure.of);
        let (theirs, their_least, their_most) = spread(turns, other, figure.of);
        let cell = |median: f64, least: f64, most: f64| {
            format!("{median:.decimals$} ({least:.decimals$}..{most:.decimals$})")
        };
        let ratio = ours / theirs;
        let held = turns.chunks_exact(2).filter(|both| {
            let of = |vmm| spread(both, vmm, figure.of).0;
            wanted.holds(of("busway"), of(other))
        });
        let held = held.count() as u32;
        let ratio = if ratio.is_finite() {
            format!("{ratio:.2}")
        } else {
            "-".to_owned()
        };
        println!(
            "{:<34} {:>24} {:>24} {ratio:>7}  {}{}",
            figure.name,
            cell(ours, least, most),
            cell(theirs, their_least, their_most),
            wanted,
            match &wanted {
                Wanted::Nothing => String::new(),
                wanted => format!(
                    " ({held} of {number} turns){}",
                    verdict(wanted, wanted.holds(ours, theirs), held, number)
                ),
            },
        );
    }
}

/// Rows of figures that Busway and QEMU gave in turns, with their medians' ratio, and the most that it is to be.
pub(crate) fn print_beside(title: &str, rows: &[(&str, Vec<f64>, Vec<f64>)], wanted: Option<f64>) {
    println!("\n{title}");
    println!(
        "{:<44} {:>22} {:>22} {:>7}  {:<14} verdict",
        "", "Busway", "QEMU", "ratio", "wanted"
    );
    for (name, ours, theirs) in rows {
        let (ours, theirs) = (
            median_and_spread(ours.clone()),
            median_and_spread(theirs.clone()),
        );
        let cell =
            |(median, least, most): (f64, f64, f64)| format!("{median:.0} ({least:.0}..{most:.0})");
        let ratio = ours.0 / theirs.0;
        let (limit, verdict) = match wanted {
            Some(limit) if ratio <= limit => (format!("ratio <= {limit}"), "holds"),
            Some(limit) => (format!("ratio <= {limit}"), "MISSED"),
            None => ("-".to_owned(), "-"),
        };
        println!(
            "{name:<44} {:>22} {:>22} {ratio:>7.2}  {limit:<14} {verdict}",
            cell(ours),
            cell(theirs)
        );
    }
}

/// What KVM counted for a read, as medians: of the counters that moved.
pub(crate) fn print_counters(turns: &[Turn], other: &str, title: &str) {
    let names: BTreeSet<&String> = turns
        .iter()
        .flat_map(|turn| turn.counters_per_read.keys())
        .collect();
    println!(
        "\n{:<32} {:>12} {:>12}",
        "KVM's counters a read", "Busway", title
    );
    for name in names {
        let of = |vmm: &str| {
            median(
                turns
                    .iter()
                    .filter(|turn| turn.vmm == vmm)
                    .filter_map(|turn| turn.counters_per_read.get(name).copied())
                    .collect(),
            )
        };
        let (ours, theirs) = (of("busway"), of(other));
        if ours.max(theirs) >= 0.0005 {
            println!("{name:<32} {ours:>12.3} {theirs:>12.3}");
        }
    }
}

/// The middle one; not a number where there is none.
fn median(mut figures: Vec<f64>) -> f64 {
    figures.sort_by(f64::total_cmp);
    let middle = figures.len() / 2;
    match (figures.get(middle.wrapping_sub(1)), figures.get(middle)) {
        (Some(below), Some(above)) if figures.len().is_multiple_of(2) => {
            f64::midpoint(*below, *above)
        }
        (_, Some(middle)) => *middle,
        _ => f64::NAN,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_missed_only_where_chance_hardly_makes_it_so() {
        assert_eq!(verdict(&NO_MORE, true, 0, 5), "");
        // 1 of 32, and 6 of 32.
        assert_eq!(verdict(&NO_MORE, false, 0, 5), "  MISSED");
        assert_eq!(verdict(&NO_MORE, false, 1, 5), "  within noise");
        assert_eq!(verdict(&NO_MORE, false, 0, 4), "  within noise");
        // 470 of 16384, and 1471.
        assert_eq!(verdict(&NO_MORE, false, 3, 14), "  MISSED");
        assert_eq!(verdict(&NO_MORE, false, 4, 14), "  within noise");
        // A read that exits to user space is none of chance's.
        assert_eq!(verdict(&Wanted::To(0.0), false, 2, 5), "  MISSED");
    }
}
