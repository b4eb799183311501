//! The time that chat templates see, and Python's `strftime` for it.

use std::time::{SystemTime, UNIX_EPOCH};

/// What `strftime_now` of a chat template says. Output must not depend on the day, so text from files and datasets is
/// rendered at [`Clock::FIXED`]; an interactive chat has today.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clock {
    /// The system's time, in UTC.
    Now,
    /// Seconds since 1970 in UTC.
    At(u64),
}

/// A moment, taken apart.
struct Moment {
    year: i64,
    month: usize,
    day: u32,
    weekday: usize,
    day_of_year: u32,
    hour: u32,
    minute: u32,
    second: u32,
}

const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];

impl Clock {
    /// 2025-08-05 12:00, the day on which gpt-oss came out.
    pub const FIXED: Self = Self::At(1_754_395_200);

    /// `format` as Python's `strftime` in the C locale fills it; the directive where one is not known.
    pub fn strftime(self, format: &str) -> Result<String, String> {
        let seconds = match self {
            Self::Now => SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs()),
            Self::At(seconds) => seconds,
        };
        let moment = Moment::new(seconds);
        let mut out = String::new();
        let mut chars = format.chars();
        while let Some(c) = chars.next() {
            if c != '%' {
                out.push(c);
                continue;
            }
            let (mut directive, mut padded) = (chars.next(), true);
            if directive == Some('-') {
                (directive, padded) = (chars.next(), false);
            }
            match directive.and_then(|d| moment.field(d, padded)) {
                Some(text) => out.push_str(&text),
                None => return Err(directive.map_or("%".into(), |d| format!("%{d}"))),
            }
        }
        Ok(out)
    }
}

impl Moment {
    fn new(seconds: u64) -> Self {
        // At most 2^64 / 86400 days: far from overflow in i64.
        let days = (seconds / 86_400) as i64;
        let time = (seconds % 86_400) as u32;
        // Howard Hinnant's civil_from_days: years begin in March, so that the leap day is the last.
        let shifted = days + 719_468;
        let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
        let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_from_march = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let month_from_march = (5 * day_from_march + 2) / 153;
        let day = day_from_march - (153 * month_from_march + 2) / 5 + 1;
        let month = (month_from_march + 2) % 12;
        let year = year_of_era + era * 400 + i64::from(month < 2);
        let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
        let before = [0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334][month as usize];
        Self {
            year,
            month: month as usize,
            day: day as u32,
            weekday: ((days + 4) % 7) as usize,
            day_of_year: before + day as u32 + u32::from(leap && month > 1),
            hour: time / 3600,
            minute: time / 60 % 60,
            second: time % 60,
        }
    }

    fn field(&self, directive: char, padded: bool) -> Option<String> {
        let number = |n: u32, width: usize| if padded { format!("{n:0width$}") } else { n.to_string() };
        let hour12 = (self.hour + 11) % 12 + 1;
        let (month, weekday) = (MONTHS[self.month], DAYS[self.weekday]);
        let join = |parts: [char; 3], by: &str| parts.map(|p| self.field(p, true).unwrap_or_default()).join(by);
        Some(match directive {
            '%' => "%".into(),
            'Y' => self.year.to_string(),
            'y' => number((self.year % 100) as u32, 2),
            'm' => number(self.month as u32 + 1, 2),
            'd' => number(self.day, 2),
            'e' => format!("{:>2}", self.day),
            'j' => number(self.day_of_year, 3),
            'B' => month.into(),
            'b' | 'h' => month[..3].into(),
            'A' => weekday.into(),
            'a' => weekday[..3].into(),
            'w' => self.weekday.to_string(),
            'H' => number(self.hour, 2),
            'I' => number(hour12, 2),
            'M' => number(self.minute, 2),
            'S' => number(self.second, 2),
            'p' => if self.hour < 12 { "AM" } else { "PM" }.into(),
            'F' => join(['Y', 'm', 'd'], "-"),
            'D' => join(['m', 'd', 'y'], "/"),
            'T' => join(['H', 'M', 'S'], ":"),
            _ => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_pythons() {
        // datetime.fromtimestamp(n, timezone.utc).strftime(...)
        let format = "%Y-%m-%d %H:%M:%S %A %a %B %b %j %y %I%p %-d/%-m %w %%";
        for (seconds, want) in [
            (0, "1970-01-01 00:00:00 Thursday Thu January Jan 001 70 12AM 1/1 4 %"),
            (1_754_395_200, "2025-08-05 12:00:00 Tuesday Tue August Aug 217 25 12PM 5/8 2 %"),
            (1_709_209_805, "2024-02-29 12:30:05 Thursday Thu February Feb 060 24 12PM 29/2 4 %"),
            (4_107_542_399, "2100-02-28 23:59:59 Sunday Sun February Feb 059 00 11PM 28/2 0 %"),
            (951_868_800, "2000-03-01 00:00:00 Wednesday Wed March Mar 061 00 12AM 1/3 3 %"),
        ] {
            assert_eq!(Clock::At(seconds).strftime(format).unwrap(), want);
        }
        assert_eq!(Clock::FIXED.strftime("%F %T %D %e").unwrap(), "2025-08-05 12:00:00 08/05/25  5");
        assert_eq!(Clock::Now.strftime("%Q"), Err("%Q".into()));
        assert_eq!(Clock::Now.strftime("100%"), Err("%".into()));
        assert!(Clock::At(u64::MAX).strftime("%F").is_ok());
    }
}
