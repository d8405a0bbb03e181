//! What was measured, reading by reading, and what it comes to: by workload and by set-up, with the set-up of QEMU's that
//! it is held against.

use serde::Serialize;

use super::spread::Spread;
use crate::figures::{NO_MORE, Wanted, verdict};

/// At least this much of the rate of QEMU's own.
pub(crate) const WANTED_RATE: f64 = 0.95;

/// A disk or NIC as a guest, or the host itself, has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SetUp {
    /// Its name in the JSON.
    pub(crate) name: &'static str,
    /// What people read.
    pub(crate) title: &'static str,
    /// The set-up of QEMU's that is the same but for the VMM, by its name.
    pub(crate) counterpart: Option<&'static str>,
}

/// Something to be done on each set-up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Workload {
    pub(crate) name: String,
    pub(crate) title: String,
    /// What its rate counts in a second, and its other figures are for: "request".
    pub(crate) operation: &'static str,
    /// How many decimals the rate is shown with.
    pub(crate) decimals: usize,
}

/// What one turn of one set-up gave for one workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Reading {
    pub(crate) turn: u32,
    pub(crate) set_up: &'static str,
    pub(crate) workload: String,
    /// Operations a second. Nothing where system calls were counted, which takes its time.
    pub(crate) rate: Option<f64>,
    /// Microseconds within which 99 of 100 operations were done, where that is known.
    pub(crate) p99_us: Option<f64>,
    /// KVM's exits for each operation; nothing on the host itself.
    pub(crate) exits: Option<f64>,
    /// Interrupts for each operation, as whoever drives the device counts them.
    pub(crate) interrupts: Option<f64>,
    /// The VMM's system calls for each operation, from a turn of their own.
    pub(crate) calls: Option<f64>,
}

/// A set-up beside its counterpart, by the ratios of turns in which both were measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Held {
    pub(crate) against: &'static str,
    /// Its rate, divided by the counterpart's.
    pub(crate) rate: Spread,
    /// Turns in which the rate's ratio was at least [`WANTED_RATE`], of how many.
    pub(crate) rate_held: u32,
    /// Its exits, divided by the counterpart's.
    pub(crate) exits: Option<Spread>,
    /// Turns in which it had no more exits.
    pub(crate) exits_held: u32,
    pub(crate) turns: u32,
}

impl Held {
    /// What is to be said of the rate and of the exits: nothing of one that holds.
    pub(crate) fn verdicts(&self) -> [&'static str; 2] {
        let rate = Wanted::RatioFrom(WANTED_RATE);
        let rate = verdict(
            &rate,
            rate.holds(self.rate.median, 1.0),
            self.rate_held,
            self.turns,
        );
        let exits = self.exits.map_or("", |exits| {
            verdict(
                &NO_MORE,
                NO_MORE.holds(exits.median, 1.0),
                self.exits_held,
                self.turns,
            )
        });
        [rate, exits].map(str::trim)
    }
}

/// All turns of one set-up with one workload.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(crate) struct Row {
    pub(crate) workload: String,
    pub(crate) set_up: &'static str,
    pub(crate) rate: Spread,
    /// The rate, divided by that of [`Results::reference`] in the same turn.
    pub(crate) ratio: Option<Spread>,
    pub(crate) p99_us: Option<Spread>,
    pub(crate) exits: Option<Spread>,
    pub(crate) interrupts: Option<Spread>,
    pub(crate) calls: Option<Spread>,
    pub(crate) held: Option<Held>,
}

/// All readings of one run, of these workloads on these set-ups.
#[derive(Debug)]
pub(crate) struct Results {
    pub(crate) workloads: Vec<Workload>,
    pub(crate) set_ups: Vec<SetUp>,
    /// The set-up that all rates are divided by, by its name.
    pub(crate) reference: &'static str,
    pub(crate) readings: Vec<Reading>,
}

impl Results {
    /// The set-up of this name, as people read it.
    pub(crate) fn title(&self, set_up: &'static str) -> &'static str {
        let found = self.set_ups.iter().find(|each| each.name == set_up);
        found.map_or(set_up, |each| each.title)
    }

    /// What was measured, by workload and then by set-up. What gave no rate in any turn is left out.
    pub(crate) fn rows(&self) -> Vec<Row> {
        let of = |workload: &Workload| {
            let rows = self.set_ups.iter();
            let rows = rows.filter_map(|set_up| self.row(workload, set_up));
            rows.collect::<Vec<_>>()
        };
        self.workloads.iter().flat_map(of).collect()
    }

    fn row(&self, workload: &Workload, set_up: &SetUp) -> Option<Row> {
        let figures = |of: fn(&Reading) -> Option<f64>| {
            let readings = self.of(&workload.name, set_up.name);
            Spread::of(readings.filter_map(of))
        };
        Some(Row {
            workload: workload.name.clone(),
            set_up: set_up.name,
            rate: figures(|reading| reading.rate)?,
            ratio: Spread::of(self.ratios(
                &workload.name,
                set_up.name,
                self.reference,
                |reading| reading.rate,
            )),
            p99_us: figures(|reading| reading.p99_us),
            exits: figures(|reading| reading.exits),
            interrupts: figures(|reading| reading.interrupts),
            calls: figures(|reading| reading.calls),
            held: self.held(&workload.name, set_up),
        })
    }

    fn held(&self, workload: &str, set_up: &SetUp) -> Option<Held> {
        let against = set_up.counterpart?;
        let rates = self.ratios(workload, set_up.name, against, |reading| reading.rate);
        let exits = self.ratios(workload, set_up.name, against, |reading| reading.exits);
        let count = |ratios: &[f64], wanted: &Wanted| {
            let held = ratios.iter().filter(|ratio| wanted.holds(**ratio, 1.0));
            held.count() as u32
        };
        Some(Held {
            against,
            rate_held: count(&rates, &Wanted::RatioFrom(WANTED_RATE)),
            exits_held: count(&exits, &NO_MORE),
            turns: rates.len() as u32,
            rate: Spread::of(rates)?,
            exits: Spread::of(exits),
        })
    }

    /// One figure of a set-up's divided by another's, turn by turn.
    fn ratios(
        &self,
        workload: &str,
        ours: &str,
        theirs: &str,
        figure: fn(&Reading) -> Option<f64>,
    ) -> Vec<f64> {
        let ratio = |reading: &Reading| {
            let mut others = self.of(workload, theirs);
            let other = others.find(|other| other.turn == reading.turn)?;
            Some(figure(reading)? / figure(other)?).filter(|ratio| ratio.is_finite())
        };
        self.of(workload, ours).filter_map(ratio).collect()
    }

    fn of(&self, workload: &str, set_up: &str) -> impl Iterator<Item = &Reading> {
        let fits =
            move |reading: &&Reading| reading.workload == workload && reading.set_up == set_up;
        self.readings.iter().filter(fits)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// Three turns of two workloads, in which ours is 2, 0.5 and 1 times as fast as QEMU's, which is at 100.
    pub(crate) fn results() -> Results {
        let set_up = |name, title, counterpart| SetUp {
            name,
            title,
            counterpart,
        };
        let mut readings = Vec::new();
        for workload in ["reads", "writes"] {
            for (turn, rate) in (1..).zip([200.0, 50.0, 100.0]) {
                for (set_up, rate, exits) in [
                    ("host", 400.0, None),
                    ("ours", rate, Some(0.5)),
                    ("qemu", 100.0, Some(1.0)),
                ] {
                    readings.push(Reading {
                        turn,
                        set_up,
                        workload: workload.to_owned(),
                        rate: Some(rate),
                        p99_us: None,
                        exits,
                        interrupts: Some(0.25),
                        calls: None,
                    });
                }
            }
        }
        readings.push(Reading {
            turn: 4,
            set_up: "ours",
            workload: "reads".to_owned(),
            rate: None,
            p99_us: None,
            exits: None,
            interrupts: None,
            calls: Some(0.125),
        });
        Results {
            workloads: ["reads", "writes"]
                .map(|name| Workload {
                    name: name.to_owned(),
                    title: format!("random {name} <4 KiB> & more"),
                    operation: "request",
                    decimals: 0,
                })
                .into(),
            set_ups: vec![
                set_up("host", "the host's own drive", None),
                set_up("ours", "Busway: raw", Some("qemu")),
                set_up("gone", "Busway: not measured", Some("qemu")),
                set_up("qemu", "QEMU: raw", None),
            ],
            reference: "qemu",
            readings,
        }
    }

    #[test]
    fn ratios_are_those_of_each_turn_and_what_was_not_measured_has_no_row() {
        let rows = results().rows();
        let names: Vec<_> = rows.iter().map(|row| row.set_up).collect();
        assert_eq!(names, ["host", "ours", "qemu", "host", "ours", "qemu"]);
        let ratio = |row: &Row| {
            row.ratio
                .map(|ratio| (ratio.median, ratio.least, ratio.most))
        };
        assert_eq!(ratio(&rows[0]), Some((4.0, 4.0, 4.0)));
        assert_eq!(ratio(&rows[1]), Some((1.0, 0.5, 2.0)));
        assert_eq!(ratio(&rows[2]), Some((1.0, 1.0, 1.0)));
        assert_eq!(rows[0].held, None);
        assert_eq!(rows[1].calls.map(|calls| calls.median), Some(0.125));
        assert_eq!(rows[4].calls, None);
    }

    #[test]
    fn a_set_up_is_held_against_its_counterpart_by_turns() {
        let rows = results().rows();
        let held = rows[1].held.clone().unwrap();
        assert_eq!((held.rate_held, held.exits_held, held.turns), (2, 3, 3));
        assert_eq!(held.verdicts(), ["", ""]);
        let mut slow = results();
        for reading in &mut slow.readings {
            if reading.set_up == "ours" {
                reading.rate = reading.rate.map(|rate| rate / 4.0);
                reading.exits = Some(1.5);
            }
        }
        // Three turns are too few to tell a miss from chance.
        let held = slow.rows()[1].held.clone().unwrap();
        assert_eq!(held.verdicts(), ["within noise", "within noise"]);
        slow.readings.retain(|reading| reading.set_up != "qemu");
        assert_eq!(slow.rows()[1].held, None);
        assert_eq!(slow.rows()[1].ratio, None);
    }

    #[test]
    fn a_miss_takes_five_turns() {
        let mut slow = results();
        let more = slow.readings.to_vec();
        slow.readings
            .extend(more.into_iter().map(|reading| Reading {
                turn: reading.turn + 10,
                ..reading
            }));
        for reading in &mut slow.readings {
            if reading.set_up == "ours" {
                reading.rate = Some(50.0);
            }
        }
        let held = slow.rows()[1].held.clone().unwrap();
        assert_eq!((held.rate_held, held.turns), (0, 6));
        assert_eq!(held.verdicts(), ["MISSED", ""]);
    }
}
