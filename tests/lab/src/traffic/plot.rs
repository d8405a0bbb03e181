//! A picture of the ratios, as SVG: a bar for each set-up and workload, with a line from the least to the most of its turns.
//!
//! It follows the viewer's choice of light or dark, has a background of its own, and fetches nothing, so that it can stand in
//! a README as it is. Set-ups are told apart by their order and by words, not by colour alone.

use std::fmt::Write as _;

use super::result::{Results, Row};

/// All lengths are in the picture's own units: pixels at its natural size.
const WIDTH: f64 = 860.0;
const MARGIN: f64 = 24.0;
/// Where bars begin, right of the set-ups' names, and how long the longest is.
const LEFT: f64 = 250.0;
const LENGTH: f64 = 420.0;
const HEAD: f64 = 92.0;
const TITLE: f64 = 26.0;
const STEP: f64 = 22.0;
const BAR: f64 = 14.0;
/// Between two workloads.
const GAP: f64 = 18.0;
/// Below the last one: the axis.
const FOOT: f64 = 46.0;
/// A ratio that is higher has its bar cut off here, and its number beside it.
const MOST: f64 = 3.0;

const STYLE: &str = "\
svg{font-family:system-ui,-apple-system,'Segoe UI','DejaVu Sans',Verdana,sans-serif}\
text{fill:#1c2330;font-size:12.5px}.page{fill:#fbfbfd;stroke:#d5dae2}.head{font-size:18px;font-weight:600}\
.small{font-size:12px;fill:#566072}.load{font-size:13px;font-weight:600}.name{text-anchor:end}\
.number{font-variant-numeric:tabular-nums}.tick{text-anchor:middle;font-size:12px;fill:#566072}\
.grid{stroke:#e1e5eb}.one{stroke:#566072;stroke-dasharray:4 3}.whisker{stroke:#1c2330;stroke-width:1.5}\
.c0{fill:#8a94a3}.c1{fill:#2f6fdb}.c2{fill:#6ea0ef}.c3{fill:#12876f}.c4{fill:#7a4fc9}\
.c5{fill:#c2700f}.c6{fill:#dd9a45}.c7{fill:#a8600c}.c8{fill:#8c4a2f}\
@media(prefers-color-scheme:dark){\
text{fill:#e8ecf2}.page{fill:#14181f;stroke:#3c4654}.small,.tick{fill:#a7b1c0}.grid{stroke:#2d3644}\
.one{stroke:#a7b1c0}.whisker{stroke:#e8ecf2}\
.c0{fill:#7d8898}.c1{fill:#5b93f5}.c2{fill:#3d6cb8}.c3{fill:#2fb395}.c4{fill:#a583e8}\
.c5{fill:#e39a3d}.c6{fill:#b3752a}.c7{fill:#cf8a3c}.c8{fill:#b87555}}";
/// Colours of [`STYLE`], by the place of the set-up.
const COLOURS: usize = 9;

/// The picture. `note` says in one line where and how this was measured.
pub(crate) fn render(results: &Results, title: &str, note: &str) -> String {
    let rows = results.rows();
    let groups: Vec<(&str, Vec<&Row>)> = results
        .workloads
        .iter()
        .map(|workload| {
            let rows = rows.iter().filter(|row| row.workload == workload.name);
            (workload.title.as_str(), rows.collect::<Vec<_>>())
        })
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let bars = groups.iter().map(|(_, rows)| rows.len()).sum::<usize>() as f64;
    let bottom = HEAD + groups.len() as f64 * (TITLE + GAP) + bars * STEP;
    let axis = Axis::of(&rows);
    let mut body = String::new();
    axis.numbers(&mut body, bottom - GAP + 16.0);
    let mut y = HEAD;
    for (workload, rows) in &groups {
        text(&mut body, MARGIN, y + 14.0, "load", workload);
        y += TITLE;
        axis.lines(&mut body, y - 4.0, y + rows.len() as f64 * STEP);
        for row in rows {
            let place = results
                .set_ups
                .iter()
                .position(|each| each.name == row.set_up);
            bar(
                &mut body,
                &axis,
                y,
                results.title(row.set_up),
                place.unwrap_or_default(),
                row,
            );
            y += STEP;
        }
        y += GAP;
    }
    let height = bottom + FOOT;
    let reference = results.title(results.reference);
    let mut head = String::new();
    text(&mut head, MARGIN, 36.0, "head", title);
    text(&mut head, MARGIN, 58.0, "small", note);
    let beyond = rows
        .iter()
        .any(|row| row.ratio.is_some_and(|ratio| ratio.median > axis.most));
    let words = format!(
        "{reference} = 1; bar: median of the turns{}; line: least to most; longer is faster",
        if beyond {
            format!(", cut off at {MOST}")
        } else {
            String::new()
        }
    );
    text(&mut body, MARGIN, bottom + FOOT - 16.0, "small", &words);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" viewBox=\"0 0 {WIDTH} {height}\" \
         role=\"img\" aria-label=\"{}\">\n<style>{STYLE}</style>\n\
         <rect class=\"page\" x=\"0.5\" y=\"0.5\" width=\"{}\" height=\"{}\" rx=\"8\"/>\n{head}{body}</svg>\n",
        escaped(title),
        WIDTH - 1.0,
        height - 1.0
    )
}

/// Ratios from 0 to a round number.
struct Axis {
    most: f64,
}

impl Axis {
    fn of(rows: &[Row]) -> Self {
        let most = rows.iter().filter_map(|row| Some(row.ratio?.most));
        let most = most.fold(1.0, f64::max).min(MOST);
        Self {
            most: (most * 2.0).ceil() / 2.0,
        }
    }

    /// Where a ratio is, which lies within the axis or is put there.
    fn x(&self, ratio: f64) -> f64 {
        LEFT + ratio.clamp(0.0, self.most) / self.most * LENGTH
    }

    /// Each half, from 0 on.
    fn ticks(&self) -> impl Iterator<Item = f64> {
        let halves = (self.most * 2.0) as u32;
        (0..=halves).map(|half| f64::from(half) / 2.0)
    }

    fn numbers(&self, body: &mut String, y: f64) {
        for tick in self.ticks() {
            text(body, self.x(tick), y, "tick", &format!("{tick:.1}"));
        }
    }

    fn lines(&self, body: &mut String, top: f64, bottom: f64) {
        for tick in self.ticks() {
            let x = self.x(tick);
            let class = if tick == 1.0 { "one" } else { "grid" };
            // Writing to a string cannot fail.
            let _ = writeln!(
                body,
                "<line class=\"{class}\" x1=\"{x:.1}\" y1=\"{top:.1}\" x2=\"{x:.1}\" y2=\"{bottom:.1}\"/>"
            );
        }
    }
}

/// The bar of one row, whose upper edge is at `y`.
fn bar(body: &mut String, axis: &Axis, y: f64, name: &str, place: usize, row: &Row) {
    let base = y + BAR - 2.5;
    text(body, LEFT - 8.0, base, "name", name);
    let Some(ratio) = row.ratio else {
        return text(body, LEFT + 8.0, base, "small", "not comparable");
    };
    let end = axis.x(ratio.median);
    let colour = place % COLOURS;
    let _ = writeln!(
        body,
        "<rect class=\"c{colour}\" x=\"{LEFT}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{BAR}\" rx=\"2\"/>",
        end - LEFT
    );
    // Of what lies beyond the axis nothing is to be seen.
    if ratio.least < axis.most {
        let (least, most) = (axis.x(ratio.least), axis.x(ratio.most));
        let middle = y + BAR / 2.0;
        let end = middle - 4.0;
        let _ = writeln!(
            body,
            "<path class=\"whisker\" fill=\"none\" d=\"M{least:.1} {middle:.1}H{most:.1}M{least:.1} {end:.1}v8M{most:.1} {end:.1}v8\"/>"
        );
    }
    let number = format!("{:.2} ({:.2}–{:.2})", ratio.median, ratio.least, ratio.most);
    text(body, LEFT + LENGTH + 16.0, base, "number", &number);
}

fn text(body: &mut String, x: f64, y: f64, class: &str, words: &str) {
    let _ = writeln!(
        body,
        "<text class=\"{class}\" x=\"{x:.1}\" y=\"{y:.1}\">{}</text>",
        escaped(words)
    );
}

/// As text or an attribute of XML, which takes no control characters.
fn escaped(words: &str) -> String {
    let mut text = String::new();
    for letter in words.chars() {
        match letter {
            '&' => text.push_str("&amp;"),
            '<' => text.push_str("&lt;"),
            '>' => text.push_str("&gt;"),
            '"' => text.push_str("&quot;"),
            letter if letter.is_control() => text.push(' '),
            letter => text.push(letter),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::result::tests::results;
    use super::*;

    /// What stands between two words, each time.
    fn all<'a>(picture: &'a str, before: &str, after: &str) -> Vec<&'a str> {
        let parts = picture.split(before).skip(1);
        parts
            .filter_map(|part| Some(part.split_once(after)?.0))
            .collect()
    }

    #[test]
    fn each_set_up_has_a_bar_of_its_ratio_and_a_line_from_least_to_most() {
        let picture = render(&results(), "Disks", "here");
        // To 2.0, and 4 is cut off at 3.0.
        let widths: Vec<f64> = all(&picture, "<rect class=\"c", "height")
            .into_iter()
            .filter_map(|part| {
                part.split("width=\"")
                    .nth(1)?
                    .split('"')
                    .next()?
                    .parse()
                    .ok()
            })
            .collect();
        assert_eq!(widths, [420.0, 140.0, 140.0, 420.0, 140.0, 140.0]);
        assert!(picture.contains("M320.0 "), "{picture}");
        assert!(picture.contains("H530.0M"), "{picture}");
        let numbers = all(&picture, "class=\"number\"", "</text>");
        assert_eq!(numbers.len(), 6);
        assert!(numbers[1].ends_with(">1.00 (0.50–2.00)"), "{}", numbers[1]);
        assert!(!picture.contains("not measured"), "{picture}");
    }

    #[test]
    fn words_are_escaped_and_the_picture_fetches_nothing() {
        let picture = render(&results(), "a<b & \"c\"\u{1b}", "x>y");
        assert!(picture.contains("a&lt;b &amp; &quot;c&quot; "), "{picture}");
        assert!(picture.contains("random reads &lt;4 KiB&gt; &amp; more"));
        assert!(!picture.contains("href") && !picture.contains("url("));
        assert_eq!(
            all(&picture, "<text", ">").len(),
            all(&picture, "</text", ">").len()
        );
    }

    #[test]
    fn without_a_reference_a_bar_is_said_to_be_none() {
        let mut alone = results();
        alone.readings.retain(|reading| reading.set_up != "qemu");
        let picture = render(&alone, "t", "n");
        assert_eq!(all(&picture, "not comparable", "<").len(), 4);
    }
}
