//! Numbers of one kind from many runs.

/// What was measured, one number a run.
#[derive(Debug, Default, Clone)]
pub struct Samples(Vec<f64>);

impl Samples {
    /// Adds a run's.
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
        self.0.sort_by(f64::total_cmp);
    }

    /// The middle one; of an even number, the mean of the two in the middle.
    pub fn median(&self) -> Option<f64> {
        let half = self.0.len() / 2;
        let upper = *self.0.get(half)?;
        let lower = if self.0.len().is_multiple_of(2) {
            self.0[half - 1]
        } else {
            upper
        };
        Some(f64::midpoint(lower, upper))
    }

    /// Median, smallest and largest: `0.81 (0.79–0.93)`.
    pub fn text(&self, digits: usize) -> String {
        match (self.median(), self.0.first(), self.0.last()) {
            (Some(median), Some(least), Some(most)) => {
                format!("{median:.digits$} ({least:.digits$}–{most:.digits$})")
            }
            _ => "–".into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_in_the_middle_and_the_spread_around_it() {
        let mut samples = Samples::default();
        assert_eq!(samples.text(1), "–");
        for value in [3.0, 1.0, 10.0] {
            samples.add(value);
        }
        assert_eq!(samples.text(1), "3.0 (1.0–10.0)");
        samples.add(4.0);
        assert_eq!(samples.median(), Some(3.5));
    }
}
