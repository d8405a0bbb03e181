//! The table of what was measured, for a terminal of some 150 columns.

use std::fmt::Write as _;

use super::result::{Held, Results, Row, WANTED_RATE};
use super::spread::Spread;

/// All workloads, each with a line for each set-up.
pub(crate) fn render(results: &Results) -> String {
    let rows = results.rows();
    let mut text = String::new();
    let reference = results.title(results.reference);
    for workload in &results.workloads {
        let rows: Vec<_> = rows
            .iter()
            .filter(|row| row.workload == workload.name)
            .collect();
        if rows.is_empty() {
            continue;
        }
        let title = &workload.title;
        let operation = workload.operation;
        // Writing to a string cannot fail.
        let _ = writeln!(
            text,
            "\n{title}\n{:<34} {:>26} {:>20} {:>7} {:>7} {:>7}  held against QEMU's own",
            "",
            format!("{operation}s a second"),
            "of the reference",
            "exits",
            "irqs",
            "calls"
        );
        for row in rows {
            let _ = writeln!(
                text,
                "{:<34} {:>26} {:>20} {:>7} {:>7} {:>7}{}",
                results.title(row.set_up),
                row.rate.show(workload.decimals),
                row.ratio.map_or("-".to_owned(), |ratio| ratio.show(2)),
                each(row.exits),
                each(row.interrupts),
                each(row.calls),
                held(row),
            );
        }
    }
    let _ = writeln!(
        text,
        "\nMedian (least..most) of the turns. The reference is {reference}. exits, irqs and calls: KVM's exits, the guest's\n\
         interrupts and the VMM's system calls for each operation. Wanted: {WANTED_RATE} of the rate of QEMU's own, and no \
         more exits."
    );
    text
}

/// A figure for each operation: its median.
fn each(figure: Option<Spread>) -> String {
    figure.map_or("-".to_owned(), |figure| format!("{:.2}", figure.median))
}

/// How a set-up stands beside QEMU's own.
fn held(row: &Row) -> String {
    let Some(held) = &row.held else {
        return String::new();
    };
    let [rate, exits] = held.verdicts();
    let Held {
        rate_held,
        exits_held,
        turns,
        ..
    } = held;
    let mut said = format!(
        "  rate {:.2} ({rate_held} of {turns}){}",
        held.rate.median,
        after(rate)
    );
    if let Some(ratio) = held.exits {
        let _ = write!(
            said,
            "; exits {:.2} ({exits_held} of {turns}){}",
            ratio.median,
            after(exits)
        );
    }
    said
}

fn after(verdict: &str) -> String {
    match verdict {
        "" => String::new(),
        verdict => format!(" {verdict}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;
    use super::*;

    #[test]
    fn each_workload_has_a_line_for_each_set_up_that_was_measured() {
        let text = render(&results());
        let lines: Vec<_> = text
            .lines()
            .filter(|line| line.contains("Busway: raw"))
            .collect();
        assert_eq!(lines.len(), 2);
        let words: Vec<_> = lines[0].split_ascii_whitespace().collect();
        assert_eq!(
            words.join(" "),
            "Busway: raw 100 (50..200) 1.00 (0.50..2.00) 0.50 0.25 0.12 \
             rate 1.00 (2 of 3); exits 0.50 (3 of 3)"
        );
        assert!(!text.contains("not measured"), "{text}");
        let host = text.lines().find(|line| line.starts_with("the host's own"));
        let host = host.unwrap().split_ascii_whitespace().collect::<Vec<_>>();
        assert_eq!(
            host.join(" "),
            "the host's own drive 400 (400..400) 4.00 (4.00..4.00) - 0.25 -"
        );
    }

    #[test]
    fn nothing_measured_is_an_empty_table() {
        let mut nothing = results();
        nothing.readings.clear();
        assert!(render(&nothing).starts_with("\nMedian"));
    }
}
