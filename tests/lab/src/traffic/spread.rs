//! Median and spread of a figure that several turns gave.

use serde::Serialize;

/// A figure's median, with the least and the most of its turns.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Spread {
    /// Nothing where there is no figure. A figure that is not finite, such as a ratio to nothing, is left out.
    pub(crate) fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut figures: Vec<f64> = figures
            .into_iter()
            .filter(|each| each.is_finite())
            .collect();
        figures.sort_by(f64::total_cmp);
        let (least, most) = (*figures.first()?, *figures.last()?);
        let upper = *figures.get(figures.len() / 2)?;
        let lower = *figures.get((figures.len() - 1) / 2)?;
        Some(Self {
            median: f64::midpoint(lower, upper),
            least,
            most,
        })
    }

    /// `MEDIAN (LEAST..MOST)`.
    pub(crate) fn show(&self, decimals: usize) -> String {
        let Self {
            median,
            least,
            most,
        } = self;
        format!("{median:.decimals$} ({least:.decimals$}..{most:.decimals$})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spread(median: f64, least: f64, most: f64) -> Option<Spread> {
        Some(Spread {
            median,
            least,
            most,
        })
    }

    #[test]
    fn the_median_of_an_even_number_lies_between_the_middle_two() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), spread(2.0, 1.0, 3.0));
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 9.0]), spread(3.0, 1.0, 9.0));
        assert_eq!(Spread::of([5.0]), spread(5.0, 5.0, 5.0));
    }

    #[test]
    fn what_is_not_finite_counts_for_nothing() {
        assert_eq!(Spread::of([]), None);
        assert_eq!(Spread::of([f64::NAN, f64::INFINITY]), None);
        assert_eq!(Spread::of([f64::NAN, 2.0]), spread(2.0, 2.0, 2.0));
    }

    #[test]
    fn it_is_shown_with_as_many_decimals_as_asked_for() {
        let shown = Spread::of([1.0, 2.5]).map(|spread| spread.show(2));
        assert_eq!(shown.as_deref(), Some("1.75 (1.00..2.50)"));
    }
}
